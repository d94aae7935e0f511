"""Measures of load: counts or ids in, numbers out; every one with its floor and its interval.

Knows nothing of models or traces. The modules:

| module | holds |
|---|---|
| `counting` | ids to counts, at memory speed |
| `load` | MaxVio, Gini, CV, entropy and the rest, of counts [..., E] |
| `floors` | what the same measures give when routing is uniform and only chance is at work |
| `blocks`, `intervals` | documents to blocks; the block bootstrap; design effect |
| `bounds` | what an expert's count says of its true share; many comparisons at once |
| `idle` | longest and current run of tokens that did not select an expert |
| `accumulate` | the same over many files: `update`, `+`, `result` |
"""
