"""Tasks: PEFT's types for them, and the classes of transformers that they stand for."""

from __future__ import annotations

#: Tasks whose models end in a classifier that was not in the base.
CLASSIFYING = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})

#: Tasks whose models have no language-model head, so that no tie matters.
HEADLESS = CLASSIFYING | {"FEATURE_EXTRACTION"}

#: Tasks whose models have one.
WRITING = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM"})

#: How the class of a task's model ends.
CLASS_ENDS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}

#: The task of a class, by the end of its name.
TASK_BY_END = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    **{end: task for task, end in CLASS_ENDS.items()},
}

#: Encoder-decoder models that read and write text, for which PEFT's class of that task is made.
TEXT_TO_TEXT = frozenset({
    "t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "led",
})  # fmt: skip
