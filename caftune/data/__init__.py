"""Rows of files and hub ids, and prompts.

readers             files and hub data sets, row by row
forms               rows as messages, prompt and completion, or text
table               rows as a memory-mapped Dataset with unchanged values
prompts             prompts and conversations for a model
boundary            where a prompt in plain text ends and its answer begins
template_errors     problems of chat templates
"""
