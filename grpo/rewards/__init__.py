"""Reward functions are the user's code: they run in killable worker processes and can only return numbers.

pool       the parent's side: groups in, Scored | Failed out, deadlines, restarts
process    one worker as the parent sees it: start, send, receive, kill
worker     the child's side: loads the files, makes the calls
preflight  before a run: do the files load, do the functions run, does the gold answer score
"""
