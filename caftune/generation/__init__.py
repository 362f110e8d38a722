"""A model answers prompts.

backends     transformers in this process, vLLM offline; settings of sampling
batches      padded batches, refilled as answers end
server       servers with OpenAI's interface: what each understands
replies      what servers send back, checked
spellings    the tokens of an answer that came as text
answers      the cache of answers, and labelling whole data sets
labels       labels as files and as training rows
progress     the progress bar
"""
