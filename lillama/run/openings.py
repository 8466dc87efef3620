"""First words of texts of many kinds, for a model to go on with (`calibration.generate.begin`: openings).

What a model writes after the token that any text begins with is mostly of the kind that it saw most of. First words
take it to the kinds that it knows besides, so that what is removed from it is not what these need
(docs/results/quality.md). English, as most models know it; a text may end in any language. None ends with a space:
tokenizers take it together with the word behind it.
"""

from __future__ import annotations

CODE = (
    "def",
    "import",
    "class",
    "#include <",
    "public class",
    "function",
    "const",
    "package main\n",
    "fn main() {\n",
    "#!/bin/bash\n",
    "/**\n *",
    "```python\n",
    "Traceback (most recent call last):\n",
)
DATA = (
    "SELECT",
    "CREATE TABLE",
    "<!DOCTYPE html>\n",
    '<?xml version="1.0"',
    '{\n  "',
    "name,",
    "version:",
    "|",
    "Table 1:",
)
MANUALS = (
    "NAME\n",
    "Usage:",
    "$",
    "# Getting started\n\n",
    "## Installation\n\n",
    "Changelog\n=========\n\n",
    "This function",
    "Parameters\n----------\n",
    "Returns",
    "The following example",
    "Note:",
    "See also",
    "Step 1:",
)
SCIENCE = (
    "Abstract\n\n",
    "In this paper, we",
    "We consider",
    "Let $",
    "Theorem 1.",
    "Proof.",
    "Definition 2.1.",
    "The experiment",
    "Figure 2:",
    "Patients",
)
LESSONS = (
    "Question:",
    "Problem:",
    "Solution:",
    "Q:",
    "Exercise 3.",
    "How to",
    "Why",
    "What is",
    "If",
    "A train",
)
NEWS = (
    "WASHINGTON (",
    "By",
    "The government",
    "According to",
    "Yesterday",
    "Breaking:",
    "He was born",
    "In 19",
    "The company",
    "The",
)
SPEECH = (
    "Ladies and gentlemen,",
    "Mr. Speaker,",
    "User:",
    "Customer:",
    "Interviewer:",
    "ACT I\n\nSCENE 1\n\n",
    '"I',
    "She",
)
LETTERS = (
    "Dear",
    "Subject:",
    "Hi",
    "Review:",
    "Price:",
    "Section 1.",
    "WHEREAS",
    "Ingredients:\n",
    "1.",
    "-",
)
STORIES = (
    "Once upon a time",
    "Chapter 1\n\n",
    "It was",
    "Game",
)
TASKS = (
    "You are",
    "Write",
    "Translate",
    "Summarize",
)

OPENINGS = (*CODE, *DATA, *MANUALS, *SCIENCE, *LESSONS, *NEWS, *SPEECH, *LETTERS, *STORIES, *TASKS)
