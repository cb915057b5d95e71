"""The loop, one module for each stage. Each header says what the stage reads and writes, and its command.

    prepare    raw rows, or the helpdesk   -> records with id, split and use; judgements; plain text
    pretrain   plain text                  -> tokenizer and a small base model
    sft        model, demonstrations       -> policy
    sample     policy, prompts             -> replies; items to judge
    collect    items                       -> judgements
    rm         policy, judgements          -> reward model
    dpo        policy, judgements          -> policy
    kto        policy, judgements          -> policy
    ppo        policy, reward, prompts     -> policy
    rloo       policy, reward, prompts     -> policy
    grpo       policy, reward, prompts     -> policy
    evaluate   policies, prompts           -> one row for each reply, with everything measured on it
    report     evaluations                 -> table, plots, page

What runs them: `config` (settings), `run` (what a stage writes, and its record), `pipeline` (which, in what
order), `cli` (the command line). What several of them share: `engine`,
`objectives` and `online` (training).
"""

import os

# Nothing calls home. Set here, before any library that would read it is imported.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "DO_NOT_TRACK": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and a fork do not go together
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # ours is there
