"""What prefill methods are shown of the vision tower, against its own eager attention in float64."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.layout import FIRST_IMAGE, layout_of
from lightvlm.methods.base import PrefillPart, Reduced, Stage, StageInput, TowerProbe
from lightvlm.tower import Seen, match_pictures, place
from python.conftest import hooks, ours
from python.talk import ANSWER, QUESTION, Conversation, check
from python.test_families import llava as llava_of
from python.test_families import tower as tower_of
from python.test_families import video, video_prompt
from python.test_host_reads import counted_reads
from python.test_prefill import ROWS, UNEVEN, noise, prompt
from python.tiny import IMAGE_ID, INTERNVL, LLAVA, QWEN, VISION_START, Family, Image, extend, generate
from python.towers import attentions, deep, oracle
from torch import Tensor

from lightvlm_ext import ops

CLASS = TowerProbe(-1, "class", keys=True)


@dataclass(frozen=True)
class Spy(PrefillPart):
    """Keeps each image's best two tokens by the tower's score, and what it was shown."""

    probe_: TowerProbe = CLASS
    min_image_tokens: int = 0
    layer: int = 0
    shown: list[StageInput] = field(default_factory=list)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return (Stage(self.layer, 0.5), Stage(self.layer + 1, 0.2))

    @property
    def tower(self) -> TowerProbe:
        return self.probe_

    def reduce(self, stage: StageInput) -> Reduced:
        self.shown.append(stage)
        assert stage.tower_scores is not None
        selection = ops.select(
            stage.tower_scores,
            keep=stage.keep,
            forced=stage.text,
            segment=stage.segment,
            capacity=stage.capacity,
        )
        hidden = ops.gather_tokens(stage.hidden, selection.index, selection.count, align="right")
        return Reduced(selection, hidden)


@pytest.fixture(scope="module", params=[LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    return request.param, deep(request.param)


@pytest.fixture(scope="module")
def llava3() -> Any:
    return deep(LLAVA)


@pytest.fixture(scope="module")
def qwen5() -> Any:
    return deep(QWEN)


def check_shown(
    model: Any, inputs: dict[str, Tensor], call: Callable[[], object], probe: TowerProbe, layer: int
) -> None:
    """What both stages were shown in a call is what the tower attends to; ``layer``: the one that is to be read."""
    spy = Spy(probe)
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(prefill=spy)) as run:
        call()
    assert run.report().stepped_aside == {}
    expected = oracle(model, inputs, layer, probe.rows)
    rough = oracle(model, inputs, layer, probe.rows, torch.float32)
    pairs = list(zip(expected, rough, strict=True))
    limits = [4 * max(float((a[i] - b[i]).abs().max()) for a, b in pairs) + 1e-7 for i in (0, 1)]
    for stage in spy.shown[:2]:
        scores, keys = stage.tower_scores, stage.tower_keys
        assert scores is not None
        assert (scores[stage.segment < 0] == 0).all()
        assert (keys is not None) == probe.keys
        pictures = [(b, picture) for b, row in enumerate(stage.pictures) for picture in row]
        assert len(pictures) == len(expected)
        for (b, picture), (score, key) in zip(pictures, expected, strict=True):
            part = slice(picture.start, picture.stop)
            places = stage.within[b, part].long()
            assert (scores[b, part] - score[places]).abs().max() <= limits[0]
            if keys is not None:
                assert (keys[b, part] - key[places]).abs().max() <= limits[1]
    # the second stage works on what the first has left
    assert spy.shown[1].hidden.shape[1] < spy.shown[0].hidden.shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "probe",
    [TowerProbe(-1, "class", True), TowerProbe(-2, "mean", True), TowerProbe(1, "class")],
    ids=["class", "mean", "no-keys"],
)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_what_is_shown(pair: tuple[Family, Any], attention: str, probe: TowerProbe, how: str) -> None:
    """A padded batch with no, one and two images, for Qwen of several sizes."""
    family, model = pair
    rows = UNEVEN if family is QWEN else ROWS
    inputs = family.batch(rows)
    layer = {-1: 4, -2: 4, 1: 1}[probe.layer] if family is QWEN else probe.layer  # 3 has windows
    model.set_attn_implementation({"vision_config": attention})
    before = attentions(model)[0].config._attn_implementation
    assert before == attention

    def call() -> None:
        if how == "generate":
            generate(model, inputs, 2)
        else:
            model(**prompt(family, rows))

    check_shown(model, inputs, call, probe, layer)
    model.set_attn_implementation({"vision_config": "sdpa"})


@pytest.mark.parametrize(
    ("kind", "strategy", "tokens"),
    [("clip", "default", 16), ("clip", "full", 17), ("siglip", "full", 16), ("siglip", "default", 15)],
)
@pytest.mark.parametrize("rows", ["class", "mean"])
def test_towers_of_llava(kind: str, strategy: str, tokens: int, rows: str) -> None:
    """SigLIP has no class token; LLaVA drops the first token in any case, or none."""
    model = llava_of(tower_of(kind), strategy)
    ids = torch.tensor([[1] + [IMAGE_ID] * 2 * tokens + [2, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= LLAVA.pixels([Image(0), Image(1)], torch.float32)
    probe = TowerProbe(0, rows, True)  # type: ignore[arg-type]
    check_shown(model, inputs, lambda: generate(model, inputs, 2), probe, 0)
    check_shown(model, inputs, lambda: model(**inputs), probe, 0)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_frames_of_a_video(qwen5: Any, how: str) -> None:
    """Each frame attends to itself; of all tokens of the video, a patch is seen by one in so many."""
    inputs = video_prompt([1], 24, [3, 4, 5]) | video(2, 3, 4)
    call = (lambda: generate(qwen5, inputs, 2)) if how == "generate" else (lambda: qwen5(**inputs))
    check_shown(qwen5, inputs, call, TowerProbe(-1, "class", True), 4)


def test_qwen2_vl_has_no_windows() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    like = deep(QWEN).config.text_config.to_dict()
    like["model_type"] = "qwen2_vl_text"
    vision = {
        "depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4,
        "spatial_merge_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        vision_config=vision, text_config=like, image_token_id=IMAGE_ID, video_token_id=61,
        vision_start_token_id=VISION_START, vision_end_token_id=59,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in attentions(model)[1].qkv.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # far from uniform attention
    inputs = QWEN.batch(UNEVEN)
    check_shown(model, inputs, lambda: model(**inputs), TowerProbe(1, "class", True), 1)


def test_flash_attention_gets_all_frames_at_once(qwen5: Any) -> None:
    """Where the tower passes the bounds of frames instead of frames, and looks its name up in the config."""
    from transformers import AttentionInterface

    inputs, names = QWEN.batch(UNEVEN), set()

    def packed(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        names.add(module.config._attn_implementation)
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        out = [
            torch.nn.functional.scaled_dot_product_attention(*part, scale=kwargs["scaling"]) for part in parts
        ]
        return torch.cat(out, 2).transpose(1, 2), None

    AttentionInterface.register("flash_of_a_test", packed)
    model = copy.deepcopy(qwen5)
    attentions(model)[0].config._attn_implementation = "flash_of_a_test"
    check_shown(model, inputs, lambda: model(**inputs), TowerProbe(-1, "class", True), 4)
    assert names == {"flash_of_a_test"}


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["several", "one"])
def test_generate_repeats_rows(pair: tuple[Family, Any], options: dict[str, Any], rows: Any) -> None:
    """generate() encodes images once and repeats rows for beams and samples afterwards."""
    family, model = pair
    spy = Spy()
    with lightvlm.attach(model, lightvlm.Plan(prefill=spy)) as run:
        torch.manual_seed(0)
        generate(model, family.batch(rows), 3, **options)
        assert run.report().stepped_aside == {}
        repeated = spy.shown[0]
        generate(model, family.batch(rows), 1)
    once = spy.shown[2]
    assert len(repeated.hidden) == 3 * len(once.hidden)
    for name in ("tower_scores", "tower_keys", "hidden"):
        assert torch.equal(getattr(repeated, name), getattr(once, name).repeat_interleave(3, 0))


def encodes_first() -> bool:
    """Whether this transformers takes features that are encoded already."""
    from transformers import LlavaForConditionalGeneration

    return "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters


needs_encoded = pytest.mark.skipif(not encodes_first(), reason="transformers encodes in the model's call")
ENCODED = "the images came in already encoded, without the vision tower's attention that the plan needs"


def encode(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The call with features instead of pixels."""
    names = ("pixel_values", "image_grid_thw")
    with torch.no_grad():
        out = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return rest | {"mm_encoder_outputs": {"image": out}}


@needs_encoded
def test_encoded_without_the_run_steps_aside(pair: tuple[Family, Any]) -> None:
    """Also right after a call whose tower was read: that was another call's."""
    family, model = pair
    whole = prompt(family, ROWS)
    inputs = encode(model, whole)
    with torch.no_grad():
        expected = model(**copy.deepcopy(inputs)).logits
        spy = Spy()
        with lightvlm.attach(model, lightvlm.Plan(prefill=spy)) as run:
            model(**whole)
            assert run.report().stepped_aside == {}
            found = model(**inputs).logits
    assert torch.equal(found, expected)
    assert len(spy.shown) == 2
    assert run.report().stepped_aside == {ENCODED: 1}


@needs_encoded
def test_encoded_under_the_run_is_used(pair: tuple[Family, Any]) -> None:
    """However often, and whatever the tower has read since; but not by a plan that reads another layer."""
    family, model = pair
    inputs, spy = prompt(family, ROWS), Spy()
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(prefill=spy)) as run:
        expected = model(**inputs).logits
        encoded = encode(model, inputs)
        encode(model, family.batch([[1, Image(7), 2]]))
        assert torch.equal(model(**copy.copy(encoded)).logits, expected)
        assert torch.equal(model(**copy.copy(encoded)).logits, expected)
    assert run.report().stepped_aside == {}
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(prefill=Spy(TowerProbe(1)))) as run:
        model(**encoded)
    assert run.report().stepped_aside == {ENCODED: 1}


@needs_encoded
def test_features_of_other_images_step_aside(llava3: Any) -> None:
    """A caller may put a list of its own into what the tower gave."""
    inputs = prompt(LLAVA, ROWS)
    with torch.no_grad(), lightvlm.attach(llava3, lightvlm.Plan(prefill=Spy())) as run:
        encoded = encode(llava3, inputs)
        out = encoded["mm_encoder_outputs"]["image"]
        shorter = LLAVA.batch([ROWS[0], ROWS[3], [1, *ROWS[3]]])
        out.pooler_output = [out.pooler_output[number] for number in (0, 3, 3)]
        model_inputs = {k: v for k, v in shorter.items() if k != "pixel_values"}
        llava3(**model_inputs, mm_encoder_outputs={"image": out})
    assert run.report().stepped_aside == {"the vision tower's images are not those of the prompt": 1}


def test_a_video_and_an_image_step_aside(qwen5: Any) -> None:
    inputs = video_prompt([VISION_START, *[IMAGE_ID] * 16], 24, [3, 4, 5])
    inputs |= video(2, 3, 4) | QWEN.pixels([Image(0)], torch.float32)
    expected = generate(qwen5, inputs, 4)
    with torch.no_grad(), lightvlm.attach(qwen5, lightvlm.Plan(prefill=Spy())) as run:
        assert torch.equal(generate(qwen5, inputs, 4), expected)
        qwen5(**inputs)
    reason = "images and videos came in one prompt, whose order the vision tower does not know"
    assert run.report().stepped_aside == {reason: 2}


def test_detach_restores_the_tower(pair: tuple[Family, Any]) -> None:
    family, model = pair
    inputs = prompt(family, ROWS)
    configs = [module.config for module in attentions(model)]
    kept = [dict(module.__dict__) for module in attentions(model)]
    names = [config._attn_implementation for config in configs]
    with torch.no_grad():
        expected = model(**inputs).logits
        with lightvlm.attach(model, lightvlm.Plan(prefill=Spy())) as run:
            assert not torch.equal(model(**inputs).logits, expected[:, -model(**inputs).logits.shape[1] :])
            run.divergence(inputs, new_tokens=2)  # takes it off and puts it on again
            assert run.report().stepped_aside == {}
        assert torch.equal(model(**inputs).logits, expected)
    assert [module.config for module in attentions(model)] == configs
    assert all(module.config is config for module, config in zip(attentions(model), configs, strict=True))
    assert [config._attn_implementation for config in configs] == names
    assert [set(module.__dict__) for module in attentions(model)] == [set(one) for one in kept]
    assert not any(ours(hook) for module in model.modules() for hook in hooks(module))


def test_a_tower_that_cannot_be_read(llava3: Any) -> None:
    from transformers import PixtralVisionConfig

    with pytest.raises(ValueError, match="plan reads layer 3 of the vision tower, which has 3 layers"):
        lightvlm.attach(llava3, lightvlm.Plan(prefill=Spy(TowerProbe(3))))
    with pytest.raises(ValueError, match="plan reads layer -4 of the vision tower, which has 3 layers"):
        lightvlm.attach(llava3, lightvlm.Plan(prefill=Spy(TowerProbe(-4))))
    tower = PixtralVisionConfig(
        image_size=16, patch_size=4, head_dim=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = llava_of(tower, "full")
    with pytest.raises(ValueError, match="lightvlm does not for LlavaForConditionalGeneration"):
        lightvlm.attach(model, lightvlm.Plan(prefill=Spy()))
    for one in (llava3, model):
        assert one.model.language_model.config._attn_implementation == "sdpa"
        assert not any(ours(hook) for module in one.modules() for hook in hooks(module))


def test_windows_everywhere_cannot_be_read() -> None:
    model = QWEN.build(tower={"depth": 2, "fullatt_block_indexes": []})
    with pytest.raises(ValueError, match="no layer in which a whole frame attends"):
        lightvlm.attach(model, lightvlm.Plan(prefill=Spy()))


@pytest.mark.parametrize("keep", ["offload", "quantize"])
def test_the_hooks_read_nothing(pair: tuple[Family, Any], keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when a prompt's images are matched, nor when a conversation is read anew."""
    family, model = pair
    plan = lightvlm.Plan(prefill=Spy(), keep_for_later=keep)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        with counted_reads(model, monkeypatch, where="hooks") as found:
            generate(model, family.batch(ROWS), 3, num_beams=2)
        assert found == []
        # whether there is padding among a question's tokens is asked once before it is read, so only here not counted
        inputs = {"past_key_values": None, **prompt(family, ROWS)}
        with counted_reads(model, monkeypatch) as found:
            out = model(**inputs)
            extend(family, model, inputs["attention_mask"], QUESTION, past_key_values=out.past_key_values)
        assert found == []
        assert run.report().reread == 1
    assert run.report().stepped_aside == {}


# -- later questions


@pytest.mark.parametrize("keep", ["offload", "quantize"])
def test_later_questions(pair: tuple[Family, Any], keep: Any) -> None:
    """The conversation that is read anew is reduced as a fresh one, by the tower's attention that was kept."""
    family, model = pair
    limit = 4 * noise(model, family, ROWS) + 1e-5
    spy = Spy()
    with (
        torch.no_grad(),
        lightvlm.attach(model, lightvlm.Plan(prefill=spy, keep_for_later=keep), trace=True) as run,
    ):
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        for question in (QUESTION, QUESTION.flip(0, 1)):
            found = talk.say(question).logits
            kept, anew = run.kept, spy.shown[-2]
            fresh = talk.afresh()
            expected = fresh.read()
            assert run.kept == kept
            for name in ("tower_scores", "tower_keys"):
                assert torch.equal(getattr(anew, name), getattr(spy.shown[-2], name))
            if keep == "offload":
                assert (found - expected[:, -found.shape[1] :]).abs().max() <= limit
            talk.answer(ANSWER)
        assert run.report().reread == 2
        assert run.report().stepped_aside == {}


def test_a_later_image(llava3: Any) -> None:
    """Images of several calls, rows that change places, a crop, and a copy."""
    limit = 4 * noise(llava3, LLAVA, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(llava3, lightvlm.Plan(prefill=Spy()), trace=True) as run:
        talk = Conversation(llava3, LLAVA, [ROWS[0], ROWS[2]])
        talk.read()
        talk.answer(ANSWER[:2])
        out = talk.show([[7, Image(9), 8, 9], [5, Image(8), 8, 9]])
        kept = run.kept
        logits = talk.afresh().read()
        assert run.kept == kept
        assert (out.logits - logits[:, -out.logits.shape[1] :]).abs().max() <= limit
        talk.cache.reorder_cache(torch.tensor([1, 0]))
        talk.rows, talk.mask = talk.rows[::-1], talk.mask.flip(0)
        other = talk.fork()
        talk.answer(ANSWER[:2])
        talk.cache.crop(-1)
        talk.rows, talk.mask = [row[:-1] for row in talk.rows], talk.mask[:, :-1]
        check(talk, QUESTION[:2], ANSWER[:2], limit)
        check(other, QUESTION[:2], ANSWER[:2], limit)
        assert run.report().reread == 3
    assert run.report().stepped_aside == {}


def test_a_cache_in_a_file(pair: tuple[Family, Any], tmp_path: Any) -> None:
    """What the tower showed is saved with the conversation."""
    family, model = pair
    limit = 4 * noise(model, family, ROWS) + 1e-5
    plan = lightvlm.Plan(prefill=Spy())
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        state = talk.cache.transcript.state()
        talk.cache.transcript = type(talk.cache.transcript).from_state(*state, "cpu")
        check(talk, QUESTION, ANSWER, limit)
        assert run.report().reread == 1
    assert run.report().stepped_aside == {}


@needs_encoded
def test_a_question_to_images_that_were_not_read(llava3: Any) -> None:
    """Nothing of them was reduced; with a compaction in the plan a later question reads all anew, in full."""
    from python.test_decode import plan_of

    plan = lightvlm.Plan(prefill=Spy(), cache=plan_of("every-token").cache)
    inputs = encode(llava3, prompt(LLAVA, ROWS))
    limit = 4 * noise(llava3, LLAVA, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(llava3, plan) as run:
        talk = Conversation(llava3, LLAVA, ROWS)
        out = llava3(**inputs)
        talk.cache, talk.mask = out.past_key_values, inputs["attention_mask"]
        talk.answer(ANSWER)
        found = talk.say(QUESTION).logits
        assert run.report().reread == 1
    reason = "earlier images were read without the vision tower's attention"
    assert run.report().stepped_aside == {ENCODED: 1, reason: 1}
    with torch.no_grad():
        expected = talk.afresh().read()[:, -3:]
    assert (found - expected).abs().max() <= limit


# -- the pieces


def test_match_pictures() -> None:
    assert match_pictures((4, 4, 9), [(4, 4), (), (9,)]) == [[0, 1], [], [2]]
    assert match_pictures((4, 9), [(4,), (4,), (9,), (9,)]) == [[0], [0], [1], [1]]
    assert match_pictures((4, 9), [(4, 9), (4, 9), (), ()]) == [[0, 1], [0, 1], [], []]
    assert match_pictures((4, 9), [(4,), (9,), (4,), (9,)]) is None  # not as generate() repeats
    assert match_pictures((4, 4), [(4, 4), (4,)]) is None
    assert match_pictures((4, 5), [(4, 4)]) is None
    assert match_pictures((4,), [()]) is None
    assert match_pictures((), [(4,)]) is None
    assert match_pictures((4, 4), [(4, 4, 4, 4)]) is None


def test_place() -> None:
    codes = torch.tensor([[0, 1, 2, 2, 1, 3], [1, FIRST_IMAGE, FIRST_IMAGE, 1, 1, 1]], dtype=torch.int32)
    data = torch.arange(1.0, 7.0).reshape(3, 2)
    seen = Seen(data, (2, 1), (TowerProbe(), 0))
    found = place(seen, [[0, 1], [0]], layout_of(codes), torch.device("cpu"))
    assert found[0].tolist() == [[0, 0], [0, 0], [1, 2], [3, 4], [0, 0], [5, 6]]
    assert found[1].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [0, 0], [0, 0]]
