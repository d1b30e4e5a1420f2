"""Commands of a chat that show what is inside: the plan, the decode state, and what else the model might have said.

Knows what to show; changes nothing but whether probabilities are recorded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from localmoe.cli.chat_totals import tier_shares
from localmoe.errors import UsageError
from localmoe.files import shown, sized

if TYPE_CHECKING:
    from localmoe.cli.chat import Chat
    from localmoe.sampler import Sample, SamplingParams

# What /probs records of each token, and how many tokens it shows.
ALTERNATIVES, LEAST_CERTAIN = 5, 8
# Of an alternative that is worth showing: 0.1 %.
LEAST_LOGPROB = math.log(0.001)


def plan(chat: Chat, _: str) -> None:
    """What localmoe plan says of this model, with the memory that is free and what this process has; measures nothing.

    Raises UsageError if it is not known how much memory there is."""
    from localmoe.bench.rates import known_rates
    from localmoe.cli.plan_report import Question, lines
    from localmoe.device import available_memory, resident_memory
    from localmoe.models.sizes import sizes_of_config
    from localmoe.placement import Budget
    from localmoe.plan import plan as predict

    llm, free = chat.llm, available_memory()
    if free is None:
        raise UsageError("this system does not tell how much RAM is available; localmoe plan --ram says it for a size")
    sizes = sizes_of_config(llm.config, llm.name)
    where = "all in memory" if llm.pager is None else "the others are read from disk"
    chat.say(f"held now   {llm.experts_held:,} of {sizes.experts:,} experts, {where}")
    rates = known_rates(llm.experts_folder, llm.backend.library if llm.backend else None)
    if rates is None:
        chat.say("speeds     not known: this machine has not been measured; localmoe plan does, in about ten seconds")
        return
    found = predict(sizes, Budget(free + resident_memory(), context=llm.context), rates)
    for name, value in lines(found, Question(sizes, rates, "typical")):
        chat.say(f"{name:<9}  {value}")


def cache(chat: Chat, _: str) -> None:
    """Bytes of the decode state by kind, the marks, and what is known of paged experts."""
    session, state = chat.session, chat.session.state
    kinds = ", ".join(f"{name} {sized(nbytes)}" for name, nbytes in state.nbytes_by_kind().items() if nbytes)
    per_token = state.nbytes_per_token
    whole = sized(round(per_token * chat.llm.context))
    chat.say(f"decode state: {sized(state.nbytes)} for {session.length:,} tokens ({kinds})")
    chat.say(f"each token more: {per_token:,.0f} bytes; the whole context: {whole}")
    marks = session.marks
    at = ", ".join(f"{mark:,}" for mark in marks) or "nowhere yet"
    chat.say(f"marks: {len(marks)}, {sized(len(marks) * state.fixed_nbytes)}; what is read again begins at {at}")
    pager = chat.llm.pager
    if pager is None:
        chat.say(f"experts: all {chat.llm.experts_held:,} in memory")
        return
    found = ", ".join(f"{share} %" for share in tier_shares(pager))
    chat.say(f"experts: {chat.llm.experts_held:,} held in RAM; found in {found}; {sized(pager.bytes_read)} read")


def recording(chat: Chat) -> SamplingParams:
    """The chat's parameters, with as many probabilities as /probs needs if they are to be recorded."""
    return replace(chat.params, logprobs=ALTERNATIVES) if chat.record_probs else chat.params


def probs(chat: Chat, argument: str) -> None:
    """Record probabilities or not, or show the least certain tokens of the last reply.

    Raises UsageError for neither, or if none were recorded."""
    if argument in ("on", "off"):
        chat.record_probs = argument == "on"
        chat.say(f"probabilities of later replies are {'' if chat.record_probs else 'not '}recorded")
        return
    if argument and not (argument.isdecimal() and 0 < int(argument) < 1_000_000):
        raise UsageError(f"/probs {shown(argument)}: expected on, off or a number of tokens to show")
    samples = chat.totals.last.logprobs if chat.totals.last is not None else None
    if not samples:
        raise UsageError("no probabilities are recorded of the last reply; /probs on records those of later ones")
    mean = sum(sample.logprob for sample in samples) / len(samples)
    chat.say(f"{len(samples):,} tokens, perplexity {math.exp(-mean):.2f}; least certain, in the order of the reply:")
    chosen = sorted(range(len(samples)), key=lambda at: samples[at].logprob)[: int(argument or LEAST_CERTAIN)]
    for at in sorted(chosen):
        chat.say(_token_line(chat, at, samples[at]))


def _token_line(chat: Chat, at: int, sample: Sample) -> str:
    """For example `  12  61.2 %  ' frog'   instead of ' dog' 20.1 %, ' cat' 7.0 %`."""

    def text(token: int) -> str:
        return repr(chat.llm.tokenizer.decode([token]))

    others = [(token, logprob) for token, logprob in sample.top if token != sample.id and logprob > LEAST_LOGPROB]
    instead = ", ".join(f"{text(token)} {_percent(logprob)}" for token, logprob in others)
    return f"{at + 1:>5}  {_percent(sample.logprob):>7}  {text(sample.id)}{instead and f'   instead of {instead}'}"


def _percent(logprob: float) -> str:
    return f"{100 * math.exp(logprob):.1f} %"
