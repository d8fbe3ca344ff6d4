"""Reward functions are user code. They run in worker processes that can be killed, and can only return numbers.

pool       parent side: takes groups, returns Scored | Failed; gives jobs to workers, enforces deadlines
groups     one group: its calls and jobs, its answers, its outcomes
process    one worker as the parent sees it: start, send, receive, kill
reaper     process between parent and worker: kills everything that the worker started
worker     child side: answers calls one by one, notices what they change; started by its path
child      what the worker runs: loads the files, makes the calls in their styles
imports    reward files and what they import
counts     counts of finished and running calls, for progress reports
preflight  checks before a run: the files load, the functions run
golds      checks before a run: the gold answers score
functions  files of rewards that are given as Python objects
pickling   pickles them by value
"""

__all__ = ["counts", "functions", "golds", "groups", "imports", "pickling", "pool", "preflight", "process"]
