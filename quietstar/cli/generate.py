"""``quietstar generate``: continue prompts, chat, or show what a model thinks in a text."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.cli import inspect, options
from quietstar.cli.options import BATCH, SEED, THOUGHTS, TOKENS, Parser, number, whole
from quietstar.data.tokenizer import check_unicode, load_tokenizer, pad_left, padding_id
from quietstar.errors import UserError, reason_of, visible
from quietstar.evaluation import controls
from quietstar.evaluation.controls import CONTROLS, GENERIC, GENERIC_TEXT, SHUFFLED, SWAPPED
from quietstar.evaluation.scoring import POSITIONS, refuse_not_finite
from quietstar.evaluation.tasks import MAX_BYTES
from quietstar.generation.gates import Gate
from quietstar.generation.generate import ThinkingStreamer, most_tokens
from quietstar.losses.scores import without_padding
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.system.limits import limited
from quietstar.system.processes import join_launch

HELP = "/reset starts over, /thoughts shows or hides thoughts, /quit ends"
NEW_TOKENS = 128
MODES = ("--prompt", "--prompts", "--chat", "--inspect", "--inspect-file")
OF_INSPECTION = ("--out", "--compare", "--controls", "--context", "--force")
OF_GENERATION = ("--max-new-tokens", "--show-thoughts", "--no-thoughts", "--positions", "--gate",
                 "--control", "--thought-top-p", "--thought-top-k", "--temperature",
                 "--top-p")  # fmt: skip
OPEN, CLOSE = "⟨", "⟩"
_HALF = "\N{REPLACEMENT CHARACTER}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate and print; a wrong option, file or model raises `UserError`."""
    parser = _parser()
    args = parser.read(arguments)
    values = vars(args)
    modes = [m for m in MODES if values[m[2:].replace("-", "_")] not in (None, False)]
    if len(modes) != 1:
        given = f"{' and '.join(modes)} do not go together" if modes else "there is nothing to do"
        raise UserError(f"{given}; give one of {', '.join(MODES)}")
    reads = modes[0].startswith("--inspect")
    parser.warn_idle(args, {
        "--batch-size": None if args.prompts else "without --prompts",
        "--system": None if args.chat else "without --chat",
        **dict.fromkeys(OF_INSPECTION, None if reads else "without --inspect"),
        **dict.fromkeys(OF_GENERATION, "with --inspect" if reads else None),
    })  # fmt: skip
    if reads:
        return inspect.main(parser, args)
    if args.chat:
        return _chat(parser, args)
    text = options.read_text(args, "--prompt", "--prompts", "give a text to continue")
    prompts = [text]
    if args.prompt is None:
        prompts = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    processes = join_launch(args.device)
    model, tokenizer, settings = _load(parser, args)
    console = Console(highlight=False)

    def read(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows: list[Any] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        if not all(rows):
            empty = prompts[rows.index([])]
            raise UserError(f"--prompt ({empty[:80]}): has no token in this model's vocabulary")
        ids, mask = pad_left(rows, padding_id(tokenizer))
        return ids.to(model.device), mask.to(model.device)

    if args.prompt is not None:
        if processes.is_main:  # a single text is not shared
            ids, mask = read(prompts)
            printer = ConsoleStreamer(tokenizer, console, args.show_thoughts, args.prompt)
            try:
                _generate(model, ids, mask, streamer=printer, **settings)
            except KeyboardInterrupt:
                console.print()  # the line that says so is no part of the text
                raise
        return 0

    def write(start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(args.seed + start)  # whichever process draws this batch
        ids, mask = read(prompts[start : start + args.batch_size])
        out = _generate(model, ids, mask, return_dict_in_generate=True, **settings)
        thoughts = None if out.thoughts is None else out.thoughts.cpu()
        return ids.cpu(), out.sequences[:, ids.shape[1] :].cpu(), thoughts

    starts = range(0, len(prompts), args.batch_size)
    for start, (ids, new, thoughts) in zip(starts, processes.share(starts, write), strict=True):
        if not processes.is_main:
            continue
        for row, prompt in enumerate(prompts[start : start + args.batch_size]):
            printer = ConsoleStreamer(tokenizer, console, args.show_thoughts, prompt)
            printer.put(ids[row])
            for step, token in enumerate(new[row]):
                if thoughts is not None:
                    printer.think(thoughts[row, step][None])
                printer.put(token)
            printer.end()
    return 0


def _chat(parser: Parser, args: argparse.Namespace) -> int:
    """Answer turns from the terminal; a wrong model or template raises `UserError`."""
    model, tokenizer, settings = _load(parser, args)
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model ({args.model}): has a tokenizer without a chat template; use --prompt"
        )
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    question = [{"role": "user", "content": "?"}]
    without = _chat_ids(tokenizer, question)  # refuses before the talk
    if args.system is not None:
        try:
            is_taken = _chat_ids(tokenizer, [*opening, *question]) != without
            reason = "it leaves them out"
        except UserError as problem:
            is_taken, reason = False, str(problem)
        if not is_taken:
            raise UserError(
                f"--system: the chat template of this model takes no system turns ({reason}). "
                "Leave --system out."
            )
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    turns = opening
    while True:
        try:
            text = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            console.print()
            return 0
        if text == "/quit":
            return 0
        if text == "/reset":
            turns = opening
        elif text == "/thoughts":
            args.show_thoughts = not args.show_thoughts
        elif text:
            asked = [*turns, {"role": "user", "content": text}]
            try:
                check_unicode(text, "this turn")
                ids = torch.tensor([_chat_ids(tokenizer, asked)], device=model.device)
                streamer = ConsoleStreamer(tokenizer, console, args.show_thoughts)
                mask = torch.ones_like(ids)
                out = _generate(model, ids, mask, streamer=streamer, **settings)
            except UserError as problem:  # the talk goes on without this turn
                message = visible(f"{problem} (/reset starts over)")
                console.print(message, style="red", markup=False)
                continue
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            turns = [*asked, {"role": "assistant", "content": answer}]


def _parser() -> Parser:
    parser = Parser(
        "quietstar generate",
        "Continues prompts, thinking before new tokens (--prompt, --prompts), talks (--chat), or\n"
        "shows the thoughts before every token of a text and what they gain (--inspect).",
    )
    options.add_model(parser)
    value = parser.value
    value("--prompt", str, None, "TEXT", "text to continue")
    value("--prompts", str, None, "FILE", "one prompt per line, UTF-8; blank lines are skipped")
    value("--batch-size", BATCH, 8, "N", "prompts of a file at once")
    parser.flag("--chat", "talk, by the tokenizer's chat template")
    value("--system", options.unicode_text, None, "TEXT", "text of the system's turn of a chat")
    value("--inspect", str, None, "TEXT", "text whose thoughts are shown")
    value("--inspect-file", str, None, "FILE", "file with such a text, UTF-8")
    parser.output("--out", "page (.html) of the thoughts, or their figures (.json)",
                  ".html", ".json")  # fmt: skip
    value("--compare", options.existing, None, "DIR", "a second model that reads the text")
    parser.flag("--controls", "also score shuffled and blank thoughts, pause tokens, and a generic "
                "text in the inspected one")  # fmt: skip
    value("--context", whole(2, 10**6, "no model reads more"), None, "N",
          "tokens of an inspected text read at once; default: all the model takes")  # fmt: skip
    value("--max-new-tokens", TOKENS, None, "N",
          f"length of the answer (default: {NEW_TOKENS}, or what fits into the model)")  # fmt: skip
    parser.flag("--show-thoughts", "print them dim, before their token")
    parser.flag("--no-thoughts", "generate with the plain model")
    parser.add_argument(
        "--positions", choices=POSITIONS, default="trained",
        help="think as trained (once before the first new token, if trained with "
        "thoughts.positions answer_start, and otherwise before each), once, or before every new "
        "token",
    )  # fmt: skip
    value("--gate", str, None, "GATE",
          "think where the plain prediction has more entropy: entropy:NATS")  # fmt: skip
    parser.add_argument("--control", choices=CONTROLS,
                        help="read other thoughts in place of the model's own")  # fmt: skip
    value("--generic", options.unicode_text, GENERIC_TEXT, "TEXT",
          "text of every thought of the generic control")  # fmt: skip
    value("--num-thoughts", THOUGHTS, 1, "K",
          "thoughts before each token, whose predictions are averaged")  # fmt: skip
    value("--thought-temperature", options.temperature, None, "T",
          "temperature of thoughts; without it their most likely tokens")  # fmt: skip
    value("--thought-top-p", number(0.0, 1.0, above=True), None, "P",
          "sample thoughts from the most likely tokens that reach this probability")  # fmt: skip
    value("--thought-top-k", whole(1, 2**31), None, "K",
          "sample thoughts from this many of the most likely tokens")  # fmt: skip
    value("--temperature", options.temperature, 0.0, "T",
          "temperature of the text; 0 takes the most likely tokens")  # fmt: skip
    value("--top-p", number(0.0, 1.0, above=True), 1.0, "P",
          "sample from the most likely tokens that reach this probability")  # fmt: skip
    value("--seed", SEED, 0, "N", "seed of text and thoughts")
    return parser


def _load(
    parser: Parser, args: argparse.Namespace
) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Load model and tokenizer, and translate the options to arguments of ``generate``."""
    temperature = args.thought_temperature
    plain = "with --no-thoughts" if args.no_thoughts else None
    greedy = None if temperature else "where thoughts are their most likely tokens"
    is_drawn = args.temperature or (temperature and not args.no_thoughts)
    parser.warn_idle(args, {
        "--num-thoughts": plain, "--thought-temperature": plain,
        "--positions": plain or ("with --gate" if args.gate else None),
        **dict.fromkeys(("--thought-top-p", "--thought-top-k"), plain or greedy),
        "--generic": None if args.control == GENERIC else "without --control generic",
        "--top-p": None if args.temperature else "where --temperature is 0",
        "--seed": None if is_drawn else "where all tokens are the most likely ones",
    })  # fmt: skip
    if not args.no_thoughts:
        options.check_greedy(args.num_thoughts, temperature)
    if args.no_thoughts and (args.show_thoughts or args.gate or args.control):
        raise UserError(
            "--no-thoughts: does not go with --show-thoughts, --gate or --control; leave one out"
        )
    if args.control == SWAPPED and (args.gate or not getattr(args, "prompts", None)):
        raise UserError(
            "--control (swapped): takes the thoughts of another text at the same token; give "
            "several --prompts, and no --gate"
        )
    remedy = "Set --no-thoughts to generate with the plain model."
    positions = "every" if args.gate else args.positions
    model = options.load_model(args, not args.no_thoughts, remedy, positions=positions)
    if args.control == SHUFFLED and model.thoughts.length < 2:
        raise UserError("--control (shuffled): thoughts of one token cannot be shuffled")
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p,
                    "top_k": 0}  # fmt: skip
    return model, tokenizer, {
        "think": _gate(args), "num_thoughts": args.num_thoughts,
        "thought_temperature": args.thought_temperature or None,
        "thought_top_p": args.thought_top_p, "thought_top_k": args.thought_top_k, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "pad_token_id": padding_id(tokenizer),
        "logits_processor": refuse_not_finite(),
        "replace_thoughts": args.control and _control(args, model, tokenizer), **sampling,
    }  # fmt: skip


def _control(
    args: argparse.Namespace, model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Tensor], Tensor]:
    """Return what makes the thoughts of a control of the model's own, (texts, thoughts, length)."""
    name, generic = args.control, []
    if name == GENERIC:
        generic = controls.generic_tokens(
            tokenizer, model.thoughts.length, args.generic, "--generic"
        )

    return controls.replacement(name, model.pause_token_id, generic)


def _generate(model: QuietStarForCausalLM, ids: Tensor, mask: Tensor, **settings: Any) -> Any:
    """Generate; what is wrong with an argument is said of its option."""
    if settings["max_new_tokens"] is None:
        most = most_tokens(model, thinks=settings["think"] is not False)
        room = NEW_TOKENS if most is None else min(NEW_TOKENS, most - ids.shape[1])
        settings["max_new_tokens"] = max(1, room)  # a prompt without any room is refused
    try:
        return model.generate(ids, attention_mask=mask, **settings)
    except UserError as problem:
        raise UserError(str(problem).replace("max_new_tokens", "--max-new-tokens")) from problem


def _gate(args: argparse.Namespace) -> bool | Gate:
    if args.gate is None:
        return not args.no_thoughts
    kind, _, threshold = args.gate.partition(":")
    try:
        if kind != "entropy":
            raise argparse.ArgumentTypeError
        return Gate("entropy", number(0.0, 1e6)(threshold))
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--gate ({args.gate}): must be entropy and a threshold in nats, as in entropy:1.5"
        ) from None


def _chat_ids(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Return the ids of the turns and of the opening of an answer, if the template takes them."""
    failure = "the chat template of the tokenizer fails"
    try:
        with limited():
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a program may raise
        raise UserError(f"{failure} ({reason_of(error)})") from error
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise UserError(f"{failure} (it gives more than {MAX_BYTES} characters, or no text)")
    ids = tokenizer(check_unicode(text, "the chat template"), add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(
            "the chat template of the tokenizer gives an empty text, but must write the turns. "
            "Mend it, or use --prompt."
        )
    return ids


class ConsoleStreamer(ThinkingStreamer):
    """Prints one text while it grows; thoughts dim, before the token that they led to.

    The opening is printed with the first token, so that an error about the prompt comes before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, console: Console, show_thoughts: bool,
        opening: str = "",
    ) -> None:  # fmt: skip
        self.tokenizer, self.console, self.show_thoughts = tokenizer, console, show_thoughts
        self.ids: list[int] = []
        self.printed: str | None = None  # of the decoded ids; None before the prompt
        self.opening = Text(visible(opening), style="bold")
        self.waiting = Text()  # thoughts, printed before the next characters

    def think(self, thoughts: Tensor) -> None:
        """Take the thoughts of the next token, (1, K, T)."""
        if self.show_thoughts:
            self.waiting.append_text(thought_text(self.tokenizer, thoughts[0].tolist()))

    def put(self, value: Tensor) -> None:
        """Print a new token and its thoughts; the first call brings the prompt."""
        self.ids += value.flatten().tolist()
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if self.printed is None:
            self.printed = text
            return
        self.console.print(self.opening, end="", soft_wrap=True)
        self.opening = Text()
        if not text.endswith(_HALF):  # the rest of a character is still to come
            self._print(text)

    def end(self) -> None:
        """End the line."""
        self._print(str(self.tokenizer.decode(self.ids, skip_special_tokens=True)))
        self.console.print()

    def _print(self, text: str) -> None:
        """Print what is new in a text; special tokens, as the padding after the end, are not."""
        if text != self.printed:
            self.waiting.append(visible(text[len(self.printed or "") :]))
            self.console.print(self.waiting, end="", soft_wrap=True)
            self.printed, self.waiting = text, Text()


def thought_text(tokenizer: PreTrainedTokenizerBase, thoughts: Sequence[list[int]]) -> Text:
    """Return thoughts as they stand in a text; empty where none was made."""
    made = [without_padding(thought) for thought in thoughts if thought and thought[0] >= 0]
    texts = [visible(str(tokenizer.decode(thought))).replace("\n", "⏎") for thought in made]
    return Text("".join(f" {OPEN}{text}{CLOSE}" for text in texts), style="dim cyan")
