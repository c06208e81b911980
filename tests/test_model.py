"""Tokenizers, presets, initialisation, and the directory that Transformers and vLLM load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen2Config

from alignment.config import InitConfig, ModelConfig
from alignment.metrics import atomic_directory
from alignment.model import build_model, load_tokenizer, model_config, save_model_dir

ROOT = Path(__file__).parents[1]
TEXTS = [f"{a} + {b} = {a + b}, the sum of {a} and {b}" for a in range(20) for b in range(20)]
NANO = ModelConfig(init=InitConfig(vocab_size=320))


def empty_model(config):
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO, ROOT, TEXTS)


@pytest.fixture(scope="module")
def nano(tokenizer):
    return build_model(model_config(NANO, tokenizer, ROOT), 7)


@pytest.fixture(scope="module")
def saved(tokenizer, nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    save_model_dir(nano, tokenizer, folder)
    return folder


def test_tokenizer_round_trips_any_text_and_splits_digits(tokenizer):
    for text in ["1234567890", " caf\u00e9 \U0001f600 \u0000\t\r\n  x", "12 + 7 = 19", "\u0663\u0664"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("2026")["input_ids"]) == ["2", "0", "2", "6"]
    vocabulary = tokenizer.get_vocab()
    assert not [token for token in vocabulary if len(token) > 1 and any(c.isdigit() for c in token)]
    assert len(tokenizer) <= 320 and len(tokenizer("the sum of")["input_ids"]) < 10
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    for _ in range(3):  # the trainer's hash maps are seeded anew each time
        again = load_tokenizer(NANO, ROOT, iter(TEXTS))
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_chat_template_opens_the_assistants_turn_and_can_be_replaced(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == opened + "yo<|end|>\n"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    own = load_tokenizer(NANO.model_copy(update={"chat_template": "own.jinja"}), tmp_path, TEXTS)
    assert own.apply_chat_template(chat, tokenize=False) == "[hi][yo]"
    with pytest.raises(ValueError, match=r"model\.chat_template: no such file.*none\.jinja"):
        load_tokenizer(NANO.model_copy(update={"chat_template": "none.jinja"}), tmp_path, TEXTS)


@pytest.mark.parametrize(
    ("preset", "total", "activated"), [("deepseek-v2-lite", 15.7e9, 2.4e9), ("deepseek-v2", 236e9, 21e9)]
)
def test_presets_have_the_papers_parameter_counts(preset, total, activated, tokenizer):
    config = model_config(ModelConfig(init=InitConfig(preset=preset)), tokenizer, ROOT)
    model = empty_model(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(counts.values()) == pytest.approx(total, rel=0.01)
    idle = model.get_input_embeddings().weight.numel()  # a token looks up one row of the table
    idle += sum(n * (1 - 6 / config.n_routed_experts) for name, n in counts.items() if ".experts." in name)
    assert sum(counts.values()) - idle == pytest.approx(activated, rel=0.03)  # the paper gives two digits


def test_presets_have_the_papers_dimensions_and_routing(tokenizer):
    config = model_config(ModelConfig(init=InitConfig(preset="deepseek-v2")), tokenizer, ROOT)
    assert (config.topk_method, config.n_group, config.topk_group) == ("group_limited_greedy", 8, 3)
    assert (config.routed_scaling_factor, config.norm_topk_prob, config.vocab_size) == (16.0, False, 102400)
    assert (config.kv_lora_rank, config.q_lora_rank, config.qk_rope_head_dim) == (512, 1536, 64)
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 40
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (12288, 5120)  # the first layer is dense
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (160, 5120, 1536)
    assert shapes["model.layers.59.mlp.shared_experts.gate_proj.weight"] == (2 * 1536, 5120)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (512 + 64, 5120)


def test_nano_is_small_and_has_the_true_latent(tokenizer, nano):
    assert nano.config.kv_lora_rank == 512 and nano.config.qk_rope_head_dim == 64
    assert nano.config.vocab_size == len(tokenizer)
    assert 1.3e6 < nano.num_parameters() < 1.6e6
    assert nano.config._experts_implementation == "grouped_mm"


def test_initialisation_follows_the_seed_alone(tokenizer, nano):
    config = model_config(NANO, tokenizer, ROOT)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again, other = build_model(config, 7), build_model(config, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in nano.state_dict().items())
    assert not torch.equal(nano.lm_head.weight, other.lm_head.weight)
    logits = nano(input_ids=torch.arange(20)[None]).logits
    assert logits.std() < 1.0  # close to uniform, so that the first steps are not spent on unlearning


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_saved_directory_loads_as_it_is(tokenizer, nano, saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        expert = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert {f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(8)} <= names
    assert torch.equal(expert, nano.model.layers[1].mlp.experts.gate_up_proj[3, 64:])
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert same(model, nano) and model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    loaded = AutoTokenizer.from_pretrained(saved)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.chat_template == tokenizer.chat_template


def test_gathered_weights_are_saved_through_an_empty_model(tokenizer, nano, tmp_path):
    shell = empty_model(nano.config)
    save_model_dir(shell, tokenizer, tmp_path / "final", state=nano.state_dict())
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), nano)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4,
        ),
        Qwen2Config(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        ),
    ],
    ids=["mixtral", "tied-qwen2"],
)  # fmt: skip
def test_other_families_are_saved_and_loaded_too(config, tokenizer, tmp_path):
    model = build_model(config)
    for number, state in enumerate([None, model.state_dict()]):
        save_model_dir(model if state is None else empty_model(config), tokenizer, tmp_path / f"{number}", state=state)
        model_config(ModelConfig(path=f"{number}"), tokenizer, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}")
        assert same(loaded, model)
        assert tokenizer.eos_token_id in torch.tensor(loaded.generation_config.eos_token_id)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "final"
    with atomic_directory(target) as folder:
        (folder / "old.txt").write_text("1")
    with pytest.raises(RuntimeError, match="torn"), atomic_directory(target) as folder:
        (folder / "new.txt").write_text("2")
        raise RuntimeError("torn")
    assert [entry.name for entry in target.iterdir()] == ["old.txt"]
    with atomic_directory(target) as folder:
        (folder / "new.txt").write_text("2")
    assert [entry.name for entry in target.iterdir()] == ["new.txt"]
    assert [entry.name for entry in target.parent.iterdir()] == ["final"]


def edited(saved: Path, tmp_path: Path, **changes) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=True is ignored by Transformers' DeepSeek-V2 and honoured by vLLM"),
        ({"vocab_size": 260}, "entries, the model only 260"),
        ({"model_type": "t5"}, "`t5` is not a causal language model"),
    ],
)
def test_unfit_models_are_refused_with_the_reason(saved, tmp_path, tokenizer, changes, part):
    folder = edited(saved, tmp_path, **changes)
    with pytest.raises(ValueError, match=str(folder)) as error:
        model_config(ModelConfig(path=str(folder)), tokenizer, ROOT)
    assert part in str(error.value)


def test_paths_that_hold_no_model_are_named(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for path, part in [("./none", "is not a directory"), ("empty", "no tokenizer in")]:
        with pytest.raises(ValueError, match=f"model.path: .*{part}|model.path: {part}"):
            load_tokenizer(ModelConfig(path=path), tmp_path, [])
    with pytest.raises(ValueError, match=r"model\.path: no model in"):
        model_config(ModelConfig(path="empty"), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="exactly one of `path` and `init`"):
        model_config(ModelConfig(), tokenizer, tmp_path)
