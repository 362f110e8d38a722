"""A model answers prompts.

Names: Answer, Sampling, transformers_backend, vllm_backend, Server, server_backend, AnswerCache, generate_labels,
    Label, label_dataset, read_labels, write_labels.

backends     transformers in this process, vLLM offline; settings of sampling
batches      padded batches, refilled as answers end
server       servers with OpenAI's interface: what each understands
replies      what servers send back, checked
spellings    the tokens of an answer that came as text
answers      the cache of answers, and labelling whole data sets
labels       labels as files and as training rows
progress     the progress bar
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "Answer": "backends",
        "Sampling": "backends",
        "transformers_backend": "backends",
        "vllm_backend": "backends",
        "Server": "server",
        "server_backend": "server",
        "AnswerCache": "answers",
        "generate_labels": "answers",
        "Label": "labels",
        "label_dataset": "labels",
        "read_labels": "labels",
        "write_labels": "labels",
    },
)
