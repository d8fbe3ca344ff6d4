"""Reward functions are user code. They run in worker processes that can be killed, and can only return numbers.

pool       parent side: takes groups, returns Scored | Failed
pump       the pool's thread: gives out jobs, enforces deadlines, replaces workers
groups     one group: its calls and jobs, its answers, its outcomes
job_queue  jobs that wait for a worker
workers    the started workers of a pool
process    one worker as the parent sees it: start, send, receive, kill
reaper     process between parent and worker: kills everything that the worker started
worker     child side: answers calls one by one; started by its path
child      what the worker runs: loads the files, makes the calls, notices what they change
imports    reward files and what they import
counts     counts of finished and running calls, for progress reports
preflight  checks before a run: the files load, the functions run
golds      checks before a run: the gold answers score
functions  files of rewards that are given as Python objects
pickling   pickles them by value
"""

__all__ = ["counts", "functions", "golds", "groups", "imports", "pickling", "pool", "preflight", "process"]
