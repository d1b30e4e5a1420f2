"""Decode steps that are recorded as graphs and played give what the same steps give otherwise. Devices and their graphs
are simulated, kernels interpreted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from localmoe import cache, decoder, sequence
from localmoe.engine import Engine
from localmoe.errors import ResourceError
from localmoe.experts.carried import CarriedExperts
from localmoe.layers import latent, sparse
from localmoe.models.family import build, config_of, expert_names
from localmoe.models.model import Model
from localmoe.session import Session
from localmoe.site import Site
from localmoe.step import Step
from tests import tiny_mla, tiny_v4
from tests.simulated_devices import RECORDING, SIMULATED, simulated
from tests.simulated_graphs import SimulatedRecorder
from tests.tiny_engine import token_ids
from tests.tiny_v4 import CSA, HCA, SLIDING
from tests.torch_ops import TorchOps
from tests.triton_kernels import HAS_GPU

# isort: split
from localmoe.experts.on_device import DeviceExperts
from localmoe.kernels.triton.ops import TritonOps

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are interpreted where there is no GPU only")
A, B = SIMULATED[:2]
IDS = token_ids(64)
# Small, because the interpreter takes its time: entries after 2 and 4 tokens, of which 3 are chosen.
SMALL_V4 = {
    "layer_types": [SLIDING, CSA, HCA], "compress_rates": {CSA: 2, HCA: 4}, "index_topk": 3, "sliding_window": 4,
    "num_hash_layers": 1, "hc_sinkhorn_iters": 2, "index_n_heads": 2, "n_routed_experts": 4,
}  # fmt: skip
TORCH = TorchOps()
SMALL_MLA = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoder, "WARM_STEPS", 1)
    with simulated():
        yield


def model(name: str, where: list[torch.device], *, ops: Any = TORCH, here: bool = True) -> Model:
    """On devices in turn; its experts too, or in RAM."""
    config: dict[str, Any]
    if name == "v4":
        config = tiny_v4.tiny_config(**SMALL_V4)
        state = tiny_v4.random_state(config)
    else:
        config = tiny_mla.tiny_config(name, **SMALL_MLA | ({"index_topk": 6} if name == "v3.2" else {}))
        state = tiny_mla.random_state(config)
    parsed = config_of(config)
    if not where:
        return build(parsed, state.__getitem__)
    layers, dense = parsed.num_layers, parsed.num_layers - parsed.num_moe_layers
    devices = [where[layer * len(where) // layers] for layer in range(layers)]
    stored = {
        layer: [[state[n] for n in expert_names(parsed, layer, e)] for e in range(parsed.num_experts)]
        for layer in range(parsed.num_moe_layers)
    }
    of_layers = {layer: devices[layer + dense] for layer in stored}
    on_gpus = dict.fromkeys(stored, DeviceExperts(stored, of_layers, ops, parsed.swiglu_limit)) if here else {}
    ram = build(parsed, state.__getitem__).experts
    sites = [Site(device, ops=ops) for device in devices]
    return build(parsed, state.__getitem__, sites=sites, experts=CarriedExperts(ram, on_gpus))


def decode(engine: Engine, sessions: list[Session], ids: list[int]) -> torch.Tensor:
    """Logits of single tokens, each given to all of some sessions."""
    return torch.stack([engine.advance([(session, [token]) for session in sessions]).logits for token in ids])


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "ROOM", 4)
    monkeypatch.setattr(cache, "_GROWN_LEAST", 1)
    monkeypatch.setattr(cache, "_ALIGNED", 1)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("name", ["v4", "v2-lite", "v3.2"])
def test_played_steps_give_the_same(name: str, prompt: int) -> None:
    """Windows fill, entries are made and chosen among, and buffers are outgrown while a recording is played. Fails if
    anything that depends on the position is recorded as it was, or a recording outlives what it was made for."""
    there, here = Engine(model(name, [A]), SimulatedRecorder()), Engine(model(name, []))
    steps, sessions = IDS[prompt : prompt + 14], (there.new_session(), here.new_session())
    for engine, session in zip((there, here), sessions, strict=True):
        engine.advance([(session, IDS[:prompt])])
    found, expected = decode(there, [sessions[0]], steps), decode(here, [sessions[1]], steps)
    assert there.decoder is not None and there.decoder.failed is None
    assert there.decoder.played >= 8
    assert torch.allclose(found, expected, atol=2e-5)


def both(name: str, where: list[torch.device], recorder: SimulatedRecorder | None = None, **how: Any) -> Pair:
    return Pair(Engine(model(name, where, **how), recorder or SimulatedRecorder()), Engine(model(name, [])))


class Pair:
    """The same sessions on devices and on the CPU."""

    def __init__(self, there: Engine, here: Engine) -> None:
        self.there, self.here = there, here
        self.sessions: list[tuple[Session, Session]] = []
        assert there.decoder is not None
        self.decoder = there.decoder

    def begin(self, ids: list[int]) -> tuple[Session, Session]:
        new = self.there.new_session(), self.here.new_session()
        self.sessions.append(new)
        assert self.differ({new: ids}) <= 2e-5
        return new

    def differ(self, chunks: dict[tuple[Session, Session], list[int]]) -> float:
        """Between the logits of a step."""
        found, expected = (
            engine.advance([(pair[i], chunk) for pair, chunk in chunks.items()]).logits
            for i, engine in enumerate((self.there, self.here))
        )
        return float((found - expected).abs().max())

    def decode(self, ids: list[int]) -> None:
        """Single tokens, each given to all sessions."""
        for token in ids:
            assert self.differ({sessions: [token] for sessions in self.sessions}) <= 2e-5


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
@pytest.mark.parametrize(("where", "here"), [([A], False), ([A, B], True), ([A, B], False)])
def test_what_the_cpu_does_meanwhile_is_done_again(name: str, where: list[torch.device], here: bool) -> None:
    """Experts in RAM, and layers on two devices. Fails if hidden states or results of one step are used in the next,
    or are not carried from one device to the other."""
    recorder = SimulatedRecorder()
    pair = both(name, where, recorder, here=here)
    pair.begin(IDS[:8])
    pair.decode(IDS[8:13])
    assert pair.decoder.failed is None
    moe = pair.there.model.config.num_moe_layers
    # Two stops in each layer whose experts are elsewhere, and one where the next device goes on. A hash layer has no
    # guess.
    guesses = 0 if here else moe - pair.there.model.config.num_hash_layers
    assert pair.decoder.played == 4
    assert recorder.graphs == 1 + (0 if here else 2 * moe) + len(where) - 1 + guesses


def test_experts_are_told_of_each_step_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what a step that was broken off left behind is used in one that is played."""
    pair, begun = both("v4", [A], here=False), list[int]()
    pair.begin(IDS[:8])
    monkeypatch.setattr(pair.there.model.experts, "prepare", begun.append)
    pair.decode(IDS[8:12])
    assert pair.decoder.played == 3 and begun == [1] * 4


def test_sequences_come_and_go() -> None:
    """Fails if a recording of some sequences is played for others."""
    pair = both("v4", [A])
    first, second = pair.begin(IDS[:8]), pair.begin(IDS[2:14])
    pair.decode(IDS[9:13])
    played = pair.decoder.played
    assert played >= 2
    pair.sessions.remove(first)
    pair.decode(IDS[13:16])
    assert pair.decoder.played >= played + 1
    pair.sessions = [second, first]
    pair.decode(IDS[16:19])
    # A chunk beside a token is no decode step, and leaves what is recorded as it is.
    assert pair.differ({second: IDS[19:20], first: IDS[20:23]}) <= 2e-5
    played = pair.decoder.played
    pair.decode(IDS[23:24])
    assert pair.decoder.played == played + 1


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_more_sequences_than_are_attended_to_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At different positions. Fails if those of the second part are taken to be where those of the first are."""
    for module in (latent, sparse):
        monkeypatch.setattr(module, "ATTENTION_TOKENS", 2)
    pair = both(name, [A])
    for first, count in ((0, 1), (3, 6), (5, 9)):
        pair.begin(IDS[first : first + count])
    pair.decode(IDS[20:25])
    assert pair.decoder.failed is None and pair.decoder.played >= 2


@torch.inference_mode()
def test_whose_choices_are_wanted_is_not_played() -> None:
    """Fails if a log of the routers stays empty."""
    pair = both("v4", [A])
    pair.begin(IDS[:8])
    pair.decode(IDS[8:11])
    state, played = pair.sessions[0][0].state, pair.decoder.played
    assert played and pair.decoder(Step.of([(state, [IDS[11]])], router_log=[])) is None
    assert pair.decoder.played == played


@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_a_sequence_that_goes_back_is_played_on(name: str) -> None:
    """Fails if a recording holds where its sequence was."""
    pair = both(name, [A])
    sessions = pair.begin(IDS[:8])
    for session in sessions:
        session.mark()
    pair.decode(IDS[8:11])
    for session in sessions:
        session.rewind(8)
    played = pair.decoder.played
    pair.decode(IDS[10:13])
    assert pair.decoder.played == played + 3


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_a_sequence_that_goes_back_to_where_nothing_was_picked(name: str) -> None:
    """Fails if what is told since there were more entries, or tokens, than are picked is played where there are not."""
    pair = both(name, [A])
    sessions = pair.begin(IDS[:4])
    for session in sessions:
        session.mark()
    pair.decode(IDS[4:11])
    played = pair.decoder.played
    for session in sessions:
        session.rewind(4)
    pair.decode(IDS[20:22])
    assert played >= 2 and pair.decoder.played == played + 1


def test_no_room_for_more_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step that has room for its own token is given up for want of room for those after it."""
    pair = both("v4", [A])
    pair.begin(IDS[:3])
    reserve = sequence.SequenceState.reserve

    def refused(state: sequence.SequenceState, tokens: int) -> None:
        if tokens == decoder.ROOM:
            raise torch.OutOfMemoryError("no room")
        reserve(state, tokens)

    monkeypatch.setattr(sequence.SequenceState, "reserve", refused)
    pair.decode(IDS[3:6])
    assert pair.decoder.failed == "no memory left on the device" and not pair.decoder.played


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("name", ["v4", "v2-lite"])
def test_a_sequence_that_goes_back_into_larger_buffers(name: str) -> None:
    """Fails if what is told of the buffers that a prompt has outgrown since is played."""
    pair = both(name, [A])
    sessions = pair.begin(IDS[:8])
    for session in sessions:
        session.mark()
    pair.decode(IDS[8:11])
    played = pair.decoder.played
    assert played >= 1 and pair.differ({sessions: IDS[11:31]}) <= 2e-5
    for session in sessions:
        session.rewind(8)
    pair.decode(IDS[31:33])
    assert pair.decoder.played == played + 1


@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_device_that_cannot_be_recorded(fail_at: int) -> None:
    """Fails if the step is lost, or is tried again each time."""
    recorder = SimulatedRecorder(fail_at)
    pair = both("v4", [A], recorder, here=False)
    pair.begin(IDS[:3])
    pair.decode(IDS[3:9])
    assert pair.decoder.played == 0 and recorder.graphs == fail_at
    assert pair.decoder.failed is not None and "not permitted when stream is capturing" in pair.decoder.failed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_memory_that_is_there_once_it_is_given_back(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the first time that a device is full is the end of recording, or nothing is given back."""
    given: list[int] = []
    recorder = SimulatedRecorder(2, error)
    monkeypatch.setattr(decoder, "give_back_device_memory", lambda: given.append(recorder.forgotten))
    pair = both("v4", [A], recorder, here=False)
    pair.begin(IDS[:3])
    pair.decode(IDS[3:9])
    assert pair.decoder.failed is None and pair.decoder.played >= 2 and given == [1]


@pytest.mark.parametrize("fail_at", [0, 3])
def test_a_step_that_is_broken_off_while_it_is_recorded(fail_at: int) -> None:
    """By whoever runs the model. Fails if the device is recorded ever after, or the step counts."""
    recorder = SimulatedRecorder(fail_at, KeyboardInterrupt())
    pair = both("v4", [A], recorder, here=False)
    sessions = pair.begin(IDS[:8])
    for session in sessions:
        session.mark()
    pair.decode(IDS[8:9])
    with pytest.raises(KeyboardInterrupt):
        pair.there.advance([(sessions[0], [IDS[9]])])
    assert not RECORDING and sessions[0].kept(IDS[:12]) == 8
    for session in sessions:
        session.rewind(8)
    pair.decode(IDS[20:23])
    assert pair.decoder.failed is None and pair.decoder.played >= 2


def test_a_sequence_that_is_dropped_is_gone() -> None:
    """With its memory. Fails if the decoder holds on to it until others are decoded."""
    pair = both("v4", [A])
    pair.begin(IDS[:8])
    pair.decode(IDS[8:11])
    state = weakref.ref(pair.sessions[0][0].state)
    pair.sessions.clear()
    assert pair.decoder.played >= 1 and state() is None
    pair.begin(IDS[:5])
    pair.decode(IDS[5:8])
    assert pair.decoder.played >= 2


@pytest.mark.parametrize("chunk", [1, 2])
def test_what_was_recorded_is_forgotten_where_memory_is_short(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a decode step, which is an error, and in another. Fails if a recording keeps memory that is needed."""
    recorder = SimulatedRecorder()
    pair = both("v4", [A], recorder)
    sessions = pair.begin(IDS[:8])
    pair.decode(IDS[8:11])
    commit, full = Step.commit, [torch.OutOfMemoryError("full")]

    def once(step: Step) -> None:
        if full:
            raise full.pop()
        commit(step)

    monkeypatch.setattr(Step, "commit", once)
    with pytest.raises(ResourceError, match="out of memory") if chunk == 1 else nullcontext():
        pair.there.advance([(sessions[0], IDS[11 : 11 + chunk])])
    assert recorder.forgotten == 1 and not full


def test_an_error_between_graphs_leaves_the_session_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step that was broken off counts, or what was recorded is not played any more."""
    pair = both("v4", [A], here=False)
    sessions = pair.begin(IDS[:8])
    for session in sessions:
        session.mark()
    pair.decode(IDS[8:11])
    experts = pair.there.model.experts
    apply = experts.apply

    def broken(layer: int, *args: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return apply(layer, *args)

    monkeypatch.setattr(experts, "apply", broken)
    with pytest.raises(KeyboardInterrupt):
        pair.there.advance([(sessions[0], [IDS[11]])])
    monkeypatch.setattr(experts, "apply", apply)
    assert sessions[0].kept(IDS[:12]) == 8
    for session in sessions:
        session.rewind(8)
    played = pair.decoder.played
    pair.decode(IDS[20:23])
    assert pair.decoder.played == played + 3


def test_what_is_not_finite_is_found_in_played_steps() -> None:
    """Fails if sums of the recorded step are looked at in each."""
    pair = both("v4", [A])
    sessions = pair.begin(IDS[:5])
    pair.decode(IDS[5:8])
    step = pair.there.advance([(sessions[0], [IDS[8]])])
    assert not step.faults
    sessions[0].state.layers[0].fixed_tensors()[0][:] = torch.inf
    step = pair.there.advance([(sessions[0], [IDS[9]])])
    assert str(step.faults[0]) == "layer 0, attention" and pair.decoder.played >= 3


@pytest.mark.parametrize(
    ("sites", "options", "why"),
    [
        ([Site(A, ops=TORCH)] * 3, {}, None),
        ([Site(A, ops=TORCH), Site(A, ops=TORCH), Site()], {}, "1 of 3 layers are on the CPU; every step is told"),
        ([Site(A)] * 3, {}, "PyTorch computes instead of our kernels"),
        ([Site(A, ops=TORCH)] * 3, {"quantize_kv": True}, "the KV cache is rounded to FP8"),
    ],
)
def test_why_there_are_no_graphs(sites: list[Site], options: dict[str, Any], why: str | None) -> None:
    """Fails if graphs are wanted and have no effect without a word, or it is said of those that nobody wants."""
    config = tiny_v4.tiny_config(**SMALL_V4)
    bound = build(config_of(config), tiny_v4.random_state(config).__getitem__, sites=sites, **options)
    wanted, refused = Engine(bound, SimulatedRecorder()), Engine(bound)
    assert refused.decoder is refused.graphs_notice is None
    if why is None:
        assert wanted.decoder is not None and wanted.graphs_notice is None
    else:
        assert wanted.decoder is None
        assert wanted.graphs_notice is not None and wanted.graphs_notice.startswith(f"no CUDA graphs: {why}")


def test_the_kernels_are_recorded_too() -> None:
    """As above, of Triton's kernels. Fails if one is given a number where another step needs another."""
    pair = both("v4", [A], ops=TritonOps(exact=True))
    pair.begin(IDS[:6])
    pair.decode(IDS[6:10])
    assert pair.decoder.played >= 2
