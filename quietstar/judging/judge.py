"""A judge: any causal LM, asked which of two texts is better, or how good one is."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.backbone.devices import find_device
from quietstar.backbone.loading import load_base
from quietstar.backbone.run import embedding_weight
from quietstar.data.tokenizer import (
    check_tokenizer_fits,
    check_unicode,
    decode_behind,
    load_tokenizer,
    padding_id,
)
from quietstar.errors import UserError
from quietstar.judging.cache import Verdict, VerdictCache, key_of
from quietstar.judging.prompts import (
    BEHIND_RATIONALE,
    FIELDS,
    LABELS,
    Answers,
    Kind,
    Prompts,
    Template,
    load_template,
)
from quietstar.judging.scoring import JudgeModel, Prefix

logger = logging.getLogger(__name__)

LEAST_MASS = 0.01
"""Below this probability of all labels together, the judge does not answer the question."""


@dataclass(frozen=True)
class Comparison:
    """Which of two candidates a judge prefers.

    Attributes:
        probability: That the first is preferred, averaged over both orders: a soft label.
        margin: Log odds of that.
        by_order: Probabilities that the first is preferred where it is shown first, and second.
        mass: Probability of both labels together in each order; empty for equal candidates.
        rationales: What the judge wrote before in each order, if asked for.
        is_equal: Whether the candidates are the same text, which is not judged.
        is_cut: Whether the prompt lost its beginning.
    """

    probability: float
    margin: float
    by_order: tuple[float, float]
    mass: tuple[float, ...]
    rationales: tuple[str, ...]
    is_equal: bool = False
    is_cut: bool = False


@dataclass(frozen=True)
class Rating:
    """How good a judge finds a candidate.

    Attributes:
        score: Expected rating, mapped from 1 .. 10 to [-1, 1].
        expected: Expected rating, sum of i P(i).
        probabilities: P(1) .. P(10), normalized.
        mass: Probability of the ten labels together before.
        rationale: What the judge wrote before, if asked for.
        is_cut: Whether the prompt lost its beginning.
    """

    score: float
    expected: float
    probabilities: tuple[float, ...]
    mass: float
    rationale: str = ""
    is_cut: bool = False


@dataclass(frozen=True)
class _Question:
    """A text that is judged, and how it begins in tokens.

    Attributes:
        values: Fields of the template.
        opening: Text before the judge's own words, or before the ending.
        ids: Tokens of the opening where a rationale is asked for, else of all before the label.
        is_cut: Whether the prompt lost its beginning.
    """

    values: Mapping[str, str]
    opening: str
    ids: list[int]
    is_cut: bool


class Judge:
    """A causal LM that judges by the probabilities of its next token (RLAIF, arXiv 2309.00267).

    Args:
        model: A causal LM on its device, quantized or not, or one with adapters of PEFT, which stay
            as they are switched: inside ``model.disable_adapter()`` the base judges.
        tokenizer: The model's tokenizer.
        template: Built-in name, file, or template.
        chat: Whether the tokenizer's chat template frames the question; None if there is one.
        rationale_tokens: Most tokens of a rationale before the verdict; 0 asks for none.
        batch_size: Texts that are run at once.
        cache: Where verdicts are kept; needs ``fingerprint``.
        fingerprint: What tells the model, its adapters and its tokenizer from others, as
            `quietstar.evaluation.scoring.fingerprint` does for a folder.

    Raises:
        UserError: A template or a model that cannot judge, or a tokenizer without a chat template
            where one is to be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Template = "continuation",
        *,
        chat: bool | None = None,
        rationale_tokens: int = 0,
        batch_size: int = 16,
        cache: VerdictCache | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if cache is not None and fingerprint is None:
            raise UserError("judge: a cache needs the model's fingerprint. Give it, or no cache.")
        if chat and not tokenizer.chat_template:
            raise UserError("--chat (on): the judge's tokenizer has no chat template. Set it off.")
        template = template if isinstance(template, Template) else load_template(template)
        uses_chat = bool(tokenizer.chat_template) if chat is None else chat
        self.prompts = Prompts(tokenizer, template, uses_chat)
        self.rationale_tokens, self.batch_size = rationale_tokens, batch_size
        self.cache, self.fingerprint = cache, fingerprint
        stops = getattr(model.generation_config, "eos_token_id", None)
        stops = [stops] if isinstance(stops, int) else [*(stops or ())]
        if isinstance(tokenizer.eos_token_id, int) and tokenizer.eos_token_id not in stops:
            stops.append(tokenizer.eos_token_id)
        self._model = JudgeModel(model, padding_id(tokenizer), stops)
        check_tokenizer_fits(tokenizer, embedding_weight(self._model.model).shape[0])
        self._answers: dict[Kind, Answers] = {}
        self._has_warned = False

    def check(self, kind: Kind) -> None:
        """Refuse to judge where no text could be, before any is at hand.

        Raises:
            UserError: The tokenizer has no tokens for the labels, or the template alone is longer
                than the judge reads.
        """
        check_readable(self.prompts, kind, self._model.context, self.rationale_tokens)
        self._answers[kind] = self.prompts.answers(kind)

    @property
    def tokens_run(self) -> int:
        """Tokens that the model has run so far, those of rationales and padding included."""
        return self._model.tokens_run

    @classmethod
    def load(
        cls, name: str, *, dtype: str = "auto", device: str | None = None, **settings: Any
    ) -> Judge:
        """Load a judge from a folder or the hub; ``settings`` are those of the constructor.

        Code that comes with a model never runs.

        Raises:
            UserError: There is no such model or tokenizer, or it cannot judge.
        """
        try:
            model = load_base(name, dtype=dtype, trust_remote_code=None)
        except UserError as problem:  # of a part that knows the key of a config only
            message = str(problem).replace("model.name_or_path (", "--model (")
            raise UserError(message) from problem
        tokenizer = load_tokenizer(name, trust_remote_code=None)
        placed: Any = model
        with of_model(name):
            return cls(placed.to(find_device(device)).eval(), tokenizer, **settings)

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        *,
        where: Sequence[str] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> list[Comparison]:
        """Say for every prompt which of two candidates is preferred (the paper's soft labels).

        Both orders are judged. P(first) = (P("1" | first, second) + P("2" | second, first)) / 2,
        with P the softmax over the logits of the two labels.

        Args:
            prompts: Texts, questions, or whatever the template asks about.
            first: A candidate for each.
            second: Another one for each.
            where: Places for messages, such as lines of a file.
            advance: Called twice for every pair, once an order is judged.

        Raises:
            UserError: A candidate that is empty or too long, lists that differ in length, or a
                judge that cannot answer.
        """
        where = where or [f"pair {number + 1}" for number in range(len(prompts))]
        _check_texts(where, prompts, candidates=(first, second))
        orders, places = [], []
        for prompt, one, two, place in zip(prompts, first, second, where, strict=True):
            if one == two:
                advance()
                advance()
                continue
            orders += [
                {"prompt": prompt, "first": one, "second": two},
                {"prompt": prompt, "first": two, "second": one},
            ]
            places += [place, place]
        verdicts = iter(self._judge("pair", orders, places, advance))
        results = []
        for one, two in zip(first, second, strict=True):
            if one == two:
                results.append(Comparison(0.5, 0.0, (0.5, 0.5), (), (), is_equal=True))
                continue
            (ahead, cut), (behind, cut_behind) = next(verdicts), next(verdicts)
            results.append(self._compare(ahead, behind, cut or cut_behind))
        return results

    def rate(
        self,
        prompts: Sequence[str],
        candidates: Sequence[str],
        *,
        where: Sequence[str] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> list[Rating]:
        """Rate a candidate for every prompt from 1 to 10 (the paper's direct RLAIF).

        P("10") is P("1") P("0" | "1") where the tokenizer writes two tokens, and P("1") excludes
        it. The score is (sum of i P(i) - 5.5) / 4.5 with P normalized over the ten.

        Args:
            prompts: Texts, questions, or whatever the template asks about.
            candidates: A candidate for each.
            where: Places for messages.
            advance: Called for every candidate that is rated.

        Raises:
            UserError: A candidate that is empty or too long, lists that differ in length, or a
                judge that cannot answer.
        """
        where = where or [f"item {number + 1}" for number in range(len(prompts))]
        _check_texts(where, prompts, candidates=(candidates,))
        values = [
            {"prompt": prompt, "candidate": candidate}
            for prompt, candidate in zip(prompts, candidates, strict=True)
        ]
        verdicts = self._judge("rating", values, where, advance)
        return [_rate(verdict, self._answers["rating"], cut) for verdict, cut in verdicts]

    # --- From texts to verdicts -------------------------------------------------------------------
    def _judge(
        self,
        kind: Kind,
        values: Sequence[Mapping[str, str]],
        where: Sequence[str],
        advance: Callable[[], object],
    ) -> list[tuple[Verdict, bool]]:
        """Judge texts, from the cache where it has them; says of each whether it was cut."""
        if kind not in self._answers:
            self._answers[kind] = self.prompts.answers(kind)
        questions = [self._fit(kind, *pair, None) for pair in zip(values, where, strict=True)]
        keys = [self._key(kind, question) for question in questions]
        count = len(self._answers[kind].ids) + (self._answers[kind].zero is not None)
        verdicts = {} if self.cache is None else self.cache.get(keys, count)
        # Equal questions are asked once.
        asked = {key: number for number, key in enumerate(keys) if key not in verdicts}
        missing = list(asked.values())
        for _ in range(len(keys) - len(missing)):
            advance()
        # The longest first: if memory does not suffice, that shows at once. Questions about one
        # prompt stay together, whose tokens are then run once.
        longest: dict[str, int] = {}
        for number in missing:
            prompt, size = values[number]["prompt"], len(questions[number].ids)
            longest[prompt] = max(size, longest.get(prompt, 0))
        missing.sort(key=lambda n: (-longest[values[n]["prompt"]], values[n]["prompt"]))
        prefix = self._model.run_prefix([questions[n].ids for n in missing] or [[]])
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            new = self._run(kind, [questions[n] for n in batch], [where[n] for n in batch], prefix)
            made = dict(zip([keys[n] for n in batch], new, strict=True))
            if self.cache is not None:
                self.cache.put(made)
            verdicts |= made
            for _ in batch:
                advance()
        results = [verdicts[key] for key in keys]
        self._check_mass(kind, results)
        return [(v, question.is_cut) for v, question in zip(results, questions, strict=True)]

    def _run(
        self, kind: Kind, questions: Sequence[_Question], where: Sequence[str], prefix: Prefix
    ) -> list[Verdict]:
        """Run a batch: rationales, if asked for, and then the labels."""
        answers, rows = self._answers[kind], [question.ids for question in questions]
        rationales = [""] * len(rows)
        if self.rationale_tokens:
            new = self._model.continuations(rows, self.rationale_tokens, prefix)
            ending = answers.ending.strip()
            # A judge without an end of its own goes on to the ending, or invents another question.
            rationales = [
                text.partition(ending)[0].rstrip() if ending else text.rstrip()
                for text in decode_behind(self.prompts.tokenizer, new)
            ]
            rows = [
                self._fit(kind, question.values, place, rationale).ids
                for question, place, rationale in zip(questions, where, rationales, strict=True)
            ]
        ids = torch.tensor(answers.ids)
        if answers.zero is None:
            logprobs = self._model.last_logprobs(rows, 1, prefix)[:, 0, ids].tolist()
        else:
            both = self._model.last_logprobs(rows, 2, prefix)
            logprobs = torch.cat([both[:, 0, ids], both[:, 1, [answers.zero]]], 1).tolist()
        return [Verdict(tuple(x), text) for x, text in zip(logprobs, rationales, strict=True)]

    def _fit(
        self, kind: Kind, values: Mapping[str, str], where: str, rationale: str | None
    ) -> _Question:
        """Encode a question, the prompt without its beginning if it would be too long.

        Both orders of a pair are cut at the same place. ``rationale`` is what `_encode` takes.
        """
        question, length = self._encode(kind, values, rationale)
        most = self._model.context
        if most is None or length <= most:
            return question
        swapped = dict(values)
        if kind == "pair":
            swapped |= {"first": values["second"], "second": values["first"]}
        prompt = values["prompt"]

        def fits(start: int) -> bool:
            return all(
                self._encode(kind, {**order, "prompt": prompt[start:]}, rationale)[1] <= most
                for order in (values, swapped)
            )

        start = bisect_left(range(len(prompt)), True, key=fits)
        question, length = self._encode(kind, {**values, "prompt": prompt[start:]}, rationale)
        if length > most:
            raise UserError(
                f"{where}: takes {length} tokens even without its prompt, and the judge reads "
                f"{most}. Shorten the candidates{' or --rationale' if rationale is None else ''}, "
                "or choose a judge that reads more."
            )
        return _Question(question.values, question.opening, question.ids, is_cut=True)

    def _encode(
        self, kind: Kind, values: Mapping[str, str], rationale: str | None
    ) -> tuple[_Question, int]:
        """Encode a question, and count the tokens that the judge must have room for.

        With rationales, the question is first the opening alone, for which ``rationale`` is None.
        """
        answers = self._answers[kind]
        behind = answers.ending + answers.gap + "1"
        opening = self.prompts.opening(kind, values, asks_rationale=self.rationale_tokens > 0)
        if self.rationale_tokens and rationale is None:
            ids = self.prompts.encode(opening)
            room = len(ids) + self.rationale_tokens
            room += len(self.prompts.encode(BEHIND_RATIONALE + behind))
            return _Question(values, opening, ids, is_cut=False), room
        own_words = "" if rationale is None else rationale + BEHIND_RATIONALE
        ids = self.prompts.encode(opening + own_words + behind)
        if ids[-1] != answers.ids[0]:
            raise UserError(
                f"judge's tokenizer: it ends {behind!r} in another token here than elsewhere."
                " Choose another ending in --template."
            )
        if answers.zero is None:  # else what follows "1" is read, too
            ids = ids[:-1]
        return _Question(values, opening, ids, is_cut=False), len(ids)

    def _compare(self, shown_first: Verdict, shown_second: Verdict, is_cut: bool) -> Comparison:
        """Average both orders, the second of which shows the first candidate as number 2."""
        one, two = (_log_normalized(verdict.logprobs) for verdict in (shown_first, shown_second))
        first, second = (one[0], two[1]), (one[1], two[0])  # log P of each candidate, by order
        verdicts = (shown_first, shown_second)
        return Comparison(
            probability=sum(map(math.exp, first)) / 2,
            margin=_log_sum(first) - _log_sum(second),
            by_order=(math.exp(first[0]), math.exp(first[1])),
            mass=tuple(math.exp(_log_sum(verdict.logprobs)) for verdict in verdicts),
            rationales=tuple(x.rationale for x in verdicts) if self.rationale_tokens else (),
            is_cut=is_cut,
        )

    def _key(self, kind: Kind, question: _Question) -> str:
        """Hash what decides a verdict; the opening holds template, texts and chat template."""
        return key_of({
            "model": self.fingerprint, "dtype": str(self._model.model.dtype), "kind": kind,
            "opening": question.opening, "ending": self._answers[kind].ending,
            "rationale_tokens": self.rationale_tokens, "chat": self.prompts.uses_chat,
        })  # fmt: skip

    def _check_mass(self, kind: Kind, verdicts: Sequence[Verdict]) -> None:
        """Warn, once, of a judge whose next token is hardly ever a label."""
        count = len(self._answers[kind].ids)
        masses = [math.exp(_log_sum(verdict.logprobs[:count])) for verdict in verdicts]
        mean = sum(masses) / max(1, len(masses))
        if masses and mean < LEAST_MASS and not self._has_warned:
            self._has_warned = True
            labels = f"{LABELS[kind][0]} to {LABELS[kind][-1]}"
            logger.warning(
                "judge: puts %.3g %% of its probability on the labels %s, so its verdicts say "
                "little; try with or without its chat template (chat), another ending in the "
                "template, or another judge",
                100 * mean, labels,
            )  # fmt: skip


def check_readable(prompts: Prompts, kind: Kind, context: int | None, rationale: int) -> None:
    """Refuse a template that leaves no room for texts.

    Args:
        prompts: Writes and encodes what the judge reads.
        kind: What it is asked.
        context: Most tokens that the judge reads; None for any number.
        rationale: Most tokens of a rationale.

    Raises:
        UserError: It does, or the tokenizer has no tokens for the labels.
    """
    answers = prompts.answers(kind)
    least = {"prompt": "", "first": "a", "second": "b", "candidate": "a"}
    values = {name: least[name] for name in FIELDS[kind]}
    opening = prompts.opening(kind, values, asks_rationale=rationale > 0)
    size = len(prompts.encode(opening + answers.ending + answers.gap + "1")) + rationale
    if context is not None and size > context:
        words = "--template and --rationale" if rationale else "--template"
        raise UserError(
            f"{words}: take {size} tokens without any texts, but the judge reads {context}. "
            f"Shorten {'them' if rationale else 'it'}, or choose a judge that reads more."
        )


@contextmanager
def of_model(name: str) -> Iterator[None]:
    """Say of which model an error is that does not name one."""
    try:
        yield
    except UserError as problem:
        if str(problem).startswith(("--model", "--template (")):
            raise
        raise UserError(f"--model ({name}): {problem}") from problem


def _check_texts(
    where: Sequence[str], prompts: Sequence[str], candidates: Sequence[Sequence[str]]
) -> None:
    if len({len(where), len(prompts), *map(len, candidates)}) > 1:
        counts = ", ".join(str(len(texts)) for texts in (prompts, *candidates))
        raise UserError(f"judge: got {counts} texts; give as many candidates as prompts")
    for place, prompt, *texts in zip(where, prompts, *candidates, strict=True):
        check_unicode(prompt, f"{place}: prompt")
        for number, text in enumerate(texts, 1):
            if not check_unicode(text, f"{place}: candidate {number}").strip():
                raise UserError(
                    f"{place}: candidate {number} is empty, and must be a text. Leave it out."
                )


def _rate(verdict: Verdict, answers: Answers, is_cut: bool) -> Rating:
    """Normalize over the ten ratings; where "10" is two tokens, "1" alone is what no "0" follows.

    P("1" alone) = P("1") (1 - P("0" | "1")).
    """
    labels = list(verdict.logprobs)
    mass = math.exp(_log_sum(labels[: len(answers.ids)]))  # with "1" goes "10" of two tokens
    if answers.zero is not None:
        one, zero = labels[0], labels.pop()
        other = -math.expm1(zero)
        labels[0] = one + math.log(other) if other > 0 else -math.inf
        labels.append(one + zero)
    probabilities = tuple(math.exp(x) for x in _log_normalized(labels))
    expected = math.fsum(i * p for i, p in enumerate(probabilities, 1))
    return Rating((expected - 5.5) / 4.5, expected, probabilities, mass, verdict.rationale, is_cut)


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(x - highest) for x in logs))


def _log_normalized(logs: Sequence[float]) -> list[float]:
    total = _log_sum(logs)
    return [x - total for x in logs]
