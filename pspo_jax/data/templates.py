"""Published system prompts and prompt formats, letter for letter, because results depend on every letter."""

from __future__ import annotations

QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

SYSTEM_PROMPTS = {
    # knoveleng/open-rs, and PSPO's recipes after it; the doubled braces are theirs.
    "open_rs": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer, "
        "and put your final answer within \\boxed{{}} . The reasoning process and answer are enclosed within <think> "
        "</think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> "
        "answer here </answer>. Note that respond by English, NOT use other languages."
    ),
    # huggingface/open-r1
    "open_r1": (
        "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You first think about the "
        "reasoning process as an internal monologue and then provide the user with the answer. Respond in the "
        "following format: <think>\n...\n</think>\n<answer>\n...\n</answer>"
    ),
    # Qwen2.5-Math's model cards
    "qwen_math": QWEN_MATH_SYSTEM,
}

QUESTIONS = {
    # lighteval's template for mathematics, which open-rs's and PSPO's tables were made with
    "lighteval": (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
        "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without "
        "quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step "
        "before answering.\n\n{question}"
    ),
    # DeepSeek-R1's and Qwen's model cards
    "boxed": f"{{question}}\n{QWEN_MATH_SYSTEM}",
    # verl's examples/data_preprocess/geo3k.py, whose text MoPPS and EasyR1 use for Geometry3k too
    "geo3k": (
        "{question} You FIRST think about the reasoning process as an internal monologue and then provide the final "
        "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in "
        "\\boxed{}."
    ),
}
"""Texts of the user's message, with {question} where the question goes."""

TEXTS = {
    # Qwen2.5-Math, as its evaluation writes it
    "qwen_math": (
        f"<|im_start|>system\n{QWEN_MATH_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ),
    # DeepSeek-R1-Zero (arXiv 2501.12948, table 1), with the answer begun as in sail-sg/understand-r1-zero
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {question}\nAssistant: <think>"
    ),
}
"""Whole prompts for tokenizers without a chat template, with {question} where the question goes."""

ANSWER_BEGINNINGS = {"r1": "<think>"}
"""The beginning of the answer that a template writes itself."""

TURN_ENDS = {"qwen_math": "<|im_end|>"}
"""The text that ends a turn in a template of TEXTS."""
