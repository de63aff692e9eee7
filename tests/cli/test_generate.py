"""lightvlm generate: answers, reports, composed processors, and every bad input it names."""

from __future__ import annotations

import lightvlm
import numpy as np
import pytest
import torch
from lightvlm import answer
from lightvlm.catalogue import make_plan, parse_options
from lightvlm.processing import QwenImages, encode, load_processor
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

PROMPT = "what is this picture ?"


@pytest.fixture(params=["qwen", "untrained"])
def folder(request):
    """Every kind of model folder."""
    return request.getfixturevalue(request.param)


def test_json(call, folder, picture):
    result = call(
        "generate", "--model", folder, "--image", picture, "--prompt", PROMPT, "--keep", 0.25,
        "--option", "min_image_tokens=4", "--max-new-tokens", 5, "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    found = result.json
    assert set(found) == {"text", "new_tokens", "report"}
    assert 1 <= found["new_tokens"] <= 5
    report = found["report"]
    assert report["prefills"] == 1
    assert report["image_tokens_kept"][-1] == max(1, int(0.25 * report["image_tokens"] + 0.5))
    assert report["image_tokens_kept"][0] == int(0.5 * report["image_tokens"] + 0.5)
    assert not report["stepped_aside"]
    assert set(report["op_calls"]) >= {"importance", "select_diverse", "gather_tokens", "merge_tokens"}


def test_text(call, folder, picture):
    words = ("generate", "--model", folder, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", 4)
    result = call(*words)
    assert result.status == 0, result.err
    assert result.out.startswith(call(*words, "--json").json["text"])
    assert "image tokens per layer" in result.out


def test_the_same_as_calling_the_library(call, folder, picture):
    """The command adds nothing of its own: same tokens as attach and generate()."""
    processor = load_processor(str(folder), AutoConfig.from_pretrained(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = encode(processor, [Image.open(picture).convert("RGB")], PROMPT)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=0.2, min_image_tokens=4)), torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
        0
    ].strip()
    result = call(
        "generate", "--model", folder, "--image", picture, "--prompt", PROMPT, "--keep", 0.2,
        "--option", "min-image-tokens=4", "--max-new-tokens", 8, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert result.json["text"] == text


def test_several_images_and_another_method(call, folder, picture, tmp_path):
    other = tmp_path / "other.jpg"
    Image.new("L", (90, 60), 200).save(other)
    result = call(
        "generate", "--model", folder, "--image", picture, "--image", other, "--prompt", PROMPT, "--method", "random",
        "--option", "min_image_tokens=1", "--option", "seed=3", "--max-new-tokens", 2, "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    report = result.json["report"]
    assert report["op_calls"]["select"] > 0
    assert report["image_tokens_kept"][-1] < report["image_tokens"]


def test_keep_everything(call, folder, picture):
    words = ("--image", picture, "--prompt", PROMPT, "--keep", 1, "--option", "decode_keep=None", "--json")
    report = call("generate", "--model", folder, *words, "--max-new-tokens", 2).json["report"]
    assert report["flops_share"] == 1.0


@pytest.mark.usefixtures("reference_is_untrained")
def test_the_reference_vlm_by_name(call, picture):
    result = call("generate", "--model", "reference", "--image", picture, "--prompt", PROMPT, "--json")
    assert result.status == 0, result.err


# -- processors ------------------------------------------------------------------------------------------------------


def test_composed_processor_expands_every_image(qwen, picture):
    processor = load_processor(str(qwen), AutoConfig.from_pretrained(qwen))
    images = [Image.open(picture).convert("RGB"), Image.new("RGB", (60, 120), (9, 9, 9))]
    inputs = encode(processor, images, PROMPT)
    sizes = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    ids = inputs["input_ids"][0].tolist()
    spans = []
    for index, token in enumerate(ids):
        if token == 3:  # <|vision_start|>
            spans.append(ids.index(4, index) - index - 1)
    assert spans == sizes
    assert sizes[0] != sizes[1]
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == 5).long())
    assert inputs["pixel_values"].shape[0] == 4 * sum(sizes)


def test_composed_processor_pads_a_batch_on_the_left(qwen, picture):
    processor = load_processor(str(qwen), AutoConfig.from_pretrained(qwen))
    if not isinstance(processor, QwenImages):
        processor = QwenImages(
            processor.image_processor, processor.tokenizer, AutoConfig.from_pretrained(qwen)
        )
    image = Image.open(picture).convert("RGB")
    inputs = processor(text=["<|image_pad|> a", "what is this"], images=[image], padding=True)
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["mm_token_type_ids"][1].sum() == 0


@pytest.mark.parametrize("text", ["what is this", "<|image_pad|><|image_pad|>"])
def test_composed_processor_counts_placeholders(qwen, picture, text):
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = QwenImages(
        AutoImageProcessor.from_pretrained(qwen),
        AutoTokenizer.from_pretrained(qwen),
        AutoConfig.from_pretrained(qwen),
    )
    with pytest.raises(ValueError, match="image placeholders for 1 images"):
        processor(text=[text], images=[Image.open(picture).convert("RGB")])


def test_first_token_comes_once(untrained, picture):
    processor = load_processor(str(untrained), AutoConfig.from_pretrained(untrained))
    inputs = encode(processor, [Image.open(picture).convert("RGB")], PROMPT)
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() <= 1


def test_without_a_chat_template(untrained, picture):
    processor = load_processor(str(untrained), AutoConfig.from_pretrained(untrained))
    processor.chat_template = None
    inputs = encode(processor, [Image.open(picture).convert("RGB")] * 2, PROMPT)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * 256


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_are_python_literals_or_words():
    pairs = ["layers=(1, 2)", "decode-keep=None", "merge=drop", "strength = 0.5", "selection='top'"]
    assert parse_options(pairs) == {
        "layers": (1, 2), "decode_keep": None, "merge": "drop", "strength": 0.5, "selection": "top",
    }  # fmt: skip


def test_plans_from_options():
    plan = make_plan("lightvlm", {"keep": 0.5, "merge": "drop", "decode_keep": None})
    assert plan == lightvlm.LightVLM(keep=0.5, merge="drop", decode_keep=None)


def test_images_are_turned_as_the_camera_says(tmp_path):
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert answer.read_image(str(tmp_path / "turned.jpg")).size == (20, 40)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, picture):
    """Files and folders that are not what they should be."""
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "text-model")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "frobnicator"}')
    (tmp_path / "garbled").mkdir()
    (tmp_path / "garbled" / "config.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "{broken}/none.png"], "--image: no such file: {broken}/none.png"),
        (["--image", "{broken}/text.png"], "--image: {broken}/text.png cannot be read as an image"),
        (["--image", "{broken}/cut.png"], "--image: {broken}/cut.png cannot be read as an image"),
        (["--image", "{broken}/empty"], "--image: no such file"),
        (["--model", "{broken}/empty"], "--model: {broken}/empty is no model folder"),
        (["--model", "{broken}/none"], "--model: no such folder: {broken}/none"),
        (["--model", "{broken}/text.png"], "--model: no such folder"),
        (["--model", "{broken}/text-model"], "LlamaForCausalLM, which lightvlm does not know"),
        (["--model", "{broken}/unknown"], "--model: cannot read the configuration"),
        (["--model", "{broken}/garbled"], "--model: cannot read the configuration"),
        (["--prompt", " "], "--prompt must not be empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--keep", "0"], "keep must be in (0, 1], got 0.0"),
        (["--keep", "1.01"], "keep must be in (0, 1], got 1.01"),
        (["--keep", "-0.5"], "keep must be in (0, 1], got -0.5"),
        (["--keep", "nan"], "keep must be in (0, 1], got nan"),
        (["--method", "magic"], "method must be one of "),
        (["--option", "strength"], "--option must be NAME=VALUE, got 'strength'"),
        (["--option", "=3"], "--option must be NAME=VALUE, got '=3'"),
        (["--option", "speed=9"], "method lightvlm has no option 'speed'"),
        (["--option", "strength=2"], "strength must be at most 1.0, got 2"),
        (["--option", "merge=glue"], "merge must be one of 'uniform', 'score', 'drop', got 'glue'"),
        (["--option", "layers=(77,)"], "layers must be ascending layer numbers within 0..7, got (77,)"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "mps"], "--device must be cpu, cuda or cuda:N, got 'mps'"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
    ],
)
def test_bad_input(call, untrained, picture, broken, words, said):
    given = {"--model": str(untrained), "--image": str(picture), "--prompt": PROMPT}
    name, value = words
    given[name] = value.format(broken=broken)
    result = call("generate", *(word for pair in given.items() for word in pair), "--json")
    assert result.status == 1
    assert not result.out
    assert said.format(broken=broken) in result.err
    assert result.err.startswith("lightvlm: ")
    assert result.err.count("\n") == 1


def test_a_model_without_weights(call, untrained, picture, tmp_path):
    for file in untrained.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = call("generate", "--model", tmp_path, "--image", picture, "--prompt", PROMPT)
    assert result.status == 1
    assert "model.safetensors" in result.err
    assert result.err.count("\n") == 1


def test_a_model_without_a_processor(call, untrained, picture, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((untrained / name).read_bytes())
    result = call("generate", "--model", tmp_path, "--image", picture, "--prompt", PROMPT)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "processor" in result.err
