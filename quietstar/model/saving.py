"""What a saved Quiet-STaR model is: a folder of safetensors and JSON.

``quietstar.json`` holds the settings, ``quietstar.safetensors`` the two vectors, the mixing head
and what was trained with a frozen language model. ``language_model/`` is, with full tuning, a
complete Hugging Face model, which loads without this package as a plain one; with LoRA and its kin
the PEFT adapter. A frozen base itself is only named. ``config.json`` tells transformers whose model
this is, and ``README.md`` is its card.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from quietstar.backbone.loading import (
    HUB_ID,
    LANGUAGE_MODEL_FOLDER,
    load_base,
    load_tensors,
    require_finite,
)
from quietstar.backbone.output_head import find_output_head
from quietstar.backbone.run import embedding_weight
from quietstar.config import MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.config.earlier import migrate
from quietstar.config.messages import shown_value
from quietstar.config.schema import Section
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError, reading, reason_of
from quietstar.model.card import CARD_FILE, model_card, write_card
from quietstar.model.mixing_head import MixingHead
from quietstar.model.self_check import check_architecture, use_thinking_attention
from quietstar.model.tuning import (
    PEFT_METHODS,
    WHOLE,
    apply_tuning,
    fold_prefix,
    load_adapters,
    quantization,
    unfreeze,
)
from quietstar.system.files import file_kind, whole_folder
from quietstar.system.inputs import check_folder

SETTINGS_FILE = "quietstar.json"
WEIGHTS_FILE = "quietstar.safetensors"
FORMAT_VERSION = 4
"""1 knew full tuning and LoRA only; 2 carried the loss of its training, and other names; up to 3
the language model lay in the folder itself."""
LANGUAGE_MODEL = "language_model."
_TODAYS_NAMES = 3
"""The first format with the names of today."""
_NEW_IN_2 = {"sampler", "positions", "position_fraction"}
"""Settings of thoughts that format 1 had not."""
_NEWER = {
    "stop", "train_markers", "top_p", "top_k", "pattern",
    "fixed_weight", "schedule", "options",
}  # fmt: skip
"""Settings that are newer than their format, and were what their defaults are."""
_WRITTEN = (
    SETTINGS_FILE, WEIGHTS_FILE, LANGUAGE_MODEL_FOLDER, "gate.json", "gate.safetensors",
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_*.json", "adapter_*.safetensors",
)  # fmt: skip
"""Files of a saved model, of any format: none of an earlier one may stay next to a new one."""
_TRAINERS = (
    "checkpoint-*",
    "runs",
    "trainer_state.json",
    "training_args.bin",
    "README.md",
    ".git*",
)
"""What transformers' Trainer, or a clone of a repository, puts where a model is to be saved."""
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template.jinja", "additional_chat_templates", "*.model",
)  # fmt: skip
"""Files of a tokenizer, which stay where a model is saved without one."""
_MOST_UNITS = 2**17
"""Width of an adapter, or virtual tokens: more than the widest model has units."""
_DAMAGED = "Save the model again, or restore the folder."

_OF_UPLOADS = {"token", "private", "commit_message", "revision"}
_OF_AUTO_CLASSES = ("_from_auto", "adapter_kwargs", "code_revision", "weights_only")
OF_DOWNLOADS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}

Model = TypeVar("Model", bound=nn.Module)


class Settings(Section):
    """What ``quietstar.json`` holds."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    """Format of the folder."""
    base_model_name_or_path: str
    """Base model, where the folder does not hold it."""
    base_revision: str | None = None
    """Commit of a base from the hub."""
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    """Type of the language model's weights."""
    vocab_size: PositiveInt
    """Tokens of the tokenizer."""
    pause_token_id: NonNegativeInt
    """Token that stands for every thought token in the pause control."""
    thoughts: ThoughtsConfig
    """Settings of the thoughts."""
    mixing_head: MixingHeadConfig
    """Settings of the mixing head."""
    texts_seen: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Texts that keyed the noise so far."""
    tuning: TuningConfig
    """Way to tune the base model."""


def save_pretrained(  # noqa: D417  (a method of the model, as the next ones)
    self: Any,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    card: str | None = None,
    max_shard_size: int | str | None = None,
    **hub: Any,
) -> None:
    """Save everything that was learned, as safetensors and JSON (`quietstar.model.saving`).

    The folder is whole or not there: one that holds an earlier model is replaced at the end, and
    what others put into it stays. A gate of the earlier model goes with it.

    Args:
        folder: Folder to write: a new or empty one, or that of an earlier model.
        tokenizer: Tokenizer to save next to the model.
        state_dict: Full weights, where the model's own are sharded.
        is_main_process: Whether this process writes.
        push_to_hub: Whether to upload the folder to the hub afterwards.
        repo_id: There; by default the name of the folder.
        card: Text of ``README.md``; by default the model is described (`quietstar.model.card`),
            unless somebody wrote a card of their own.
        max_shard_size: Most bytes of one file of the language model's weights.
        **hub: ``token``, ``private``, ``commit_message`` and ``revision`` of the upload.

    Raises:
        UserError: The folder holds something else, is a link, or cannot be written; or some
            weights are not finite.
    """
    if unknown := sorted(hub.keys() - _OF_UPLOADS - {"safe_serialization", "save_peft_format"}):
        raise UserError(f"save_pretrained: {unknown[0]}: unknown argument. Leave it out.")
    if not is_main_process:
        return
    path, method = Path(os.path.abspath(Path(folder).expanduser())), self.tuning.method
    check_replaceable(path)
    all_weights = self.state_dict() if state_dict is None else state_dict
    require_finite(all_weights.items(), f"{folder}: the model is not saved")
    inner = None
    if state_dict is not None:
        names = [name for name in state_dict if name.startswith(LANGUAGE_MODEL)]
        inner = {name.removeprefix(LANGUAGE_MODEL): state_dict[name] for name in names}
    settings = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": self.causal_lm.config.name_or_path,
        "base_revision": vars(self.causal_lm.config).get("_commit_hash"),  # of a hub model
        "dtype": str(self.causal_lm.dtype).removeprefix("torch."),
        "vocab_size": self.vocab_size,
        "pause_token_id": self.pause_token_id,
        "thoughts": self.thoughts.model_dump(),
        "mixing_head": self.mixing_head_config.model_dump(),
        "texts_seen": self.texts_seen,
        "tuning": self.tuning.model_dump(),
    }
    beside = names_beside(self)
    own = {n: x.detach().contiguous() for n, x in all_weights.items() if n in beside}
    if self.tuning.options.get("encoder_hidden_size") is not None:
        # A prefix loads without what made it.
        own = fold_prefix(self, own)
        del settings["tuning"]["options"]["encoder_hidden_size"]
    try:
        with whole_folder(path) as new:
            _keep_others(
                path, new, _WRITTEN if tokenizer is None else (*_WRITTEN, *TOKENIZER_FILES)
            )
            if method in (*WHOLE, *PEFT_METHODS):
                within = new / LANGUAGE_MODEL_FOLDER
                size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
                size = size if method in WHOLE else {}
                self.language_model.save_pretrained(within, state_dict=inner, **size)
                (within / CARD_FILE).unlink(missing_ok=True)  # PEFT's empty form
                if tokenizer is not None and method in WHOLE:
                    tokenizer.save_pretrained(within)  # it loads by itself
            save_file(own, new / WEIGHTS_FILE, metadata={"format": "pt"})
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(new)
            content = json.dumps(settings, indent=2, allow_nan=False)
            (new / SETTINGS_FILE).write_text(content + "\n", encoding="utf-8")
            write_card(new, model_card(self) if card is None else card, is_given=card is not None)
    except UserError:
        raise
    except Exception as problem:  # of many kinds: the tokenizer's is a bare Exception
        raise UserError(
            f"{folder}: the model cannot be written ({reason_of(problem)}). Free some space there, "
            "or give another place."
        ) from problem
    if push_to_hub:
        upload(path, repo_id or path.name, **hub)


def push_to_hub(  # noqa: D417
    self: Any, repo_id: str, tokenizer: PreTrainedTokenizerBase | None = None, **hub: Any
) -> str:
    """Upload the model to the hub, by default with its tokenizer; returns the address.

    Args:
        repo_id: ``name``, or ``owner/name``.
        tokenizer: Tokenizer to upload with it.
        **hub: ``token``, ``private``, ``commit_message`` and ``revision``.

    Raises:
        UserError: The hub refuses it, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        self.save_pretrained(model, tokenizer or self.tokenizer)
        return upload(model, repo_id, **hub)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    **_: Any,
) -> str:
    """Upload the folder of a saved model to the hub; returns its address there.

    Raises:
        UserError: The hub refuses it, or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, revision=revision,
            commit_message=commit_message or "Upload a model that thinks",
            ignore_patterns=["checkpoint-*", "runs", "*.lock"],
        )  # fmt: skip
    except Exception as problem:  # of many kinds: network, rights, names
        raise UserError(
            f"push_to_hub ({repo_id}): the hub did not take it ({reason_of(problem)}). Look at the "
            "name and at `hf auth whoami`; nothing else was lost."
        ) from problem
    return str(repo)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder to save into that is not new, empty, or that of a saved model.

    Raises:
        UserError: It is something else, which would be lost.
    """
    try:
        kind = file_kind(folder)
        is_other = kind == "folder" and not (folder / SETTINGS_FILE).is_file()
        if kind not in ("none", "folder"):
            raise UserError(f"{folder}: is no folder and is not replaced. Give a new folder.")
        if is_other and any(not _is_named(path, _TRAINERS) for path in folder.iterdir()):
            raise UserError(
                f"{folder}: already holds something that is no saved model ({SETTINGS_FILE} is "
                "missing). Give a new folder."
            )
        if kind == "folder" and Path.cwd().is_relative_to(folder):
            raise UserError(f"{folder}: holds the working directory. Give a folder in it.")
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot be written ({reason_of(problem)}). Give another place."
        ) from problem


def _keep_others(folder: Path, new: Path, written: tuple[str, ...]) -> None:
    """Have what is in ``folder`` and was not ``written`` by us in the one that replaces it, too."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _is_named(path, written):
            continue
        if file_kind(path) == "folder":
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, new / path.name)


def _is_named(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def names_beside(model: Any) -> set[str]:
    """Name the tensors that lie in ``quietstar.safetensors``.

    They are the two vectors, the mixing head, and what trains of the language model and lies in no
    other file.
    """
    method = model.tuning.method
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if method in WHOLE:
        trained = set()
    elif method in PEFT_METHODS:
        trained = {name for name in trained if "lora_" not in name and "ia3_" not in name}
    return trained | {name for name in model.state_dict() if not name.startswith(LANGUAGE_MODEL)}


def from_pretrained(  # noqa: D417
    cls: type[Model],
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    trainable: bool = False,
    trust_remote_code: bool | None = False,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    config: Any = None,
    **hub: Any,
) -> Model:
    """Load a saved Quiet-STaR model: what was saved is what is used.

    Args:
        folder: Folder that `save_pretrained` wrote, or hub id of one that was uploaded.
        dtype: Type of the language model's weights; by default the one they were trained in.
        trainable: Whether adapters can be trained further.
        trust_remote_code: Whether code that the folder or its base names may run: that of the base,
            and a sampler of one's own in a module that is not imported yet.
        device_map: Where the language model's weights go, as transformers takes it: onto one
            device, or some of them to memory or disk until that device needs them. "auto" fills
            one device with layers, and does this with the rest.
        max_memory: With "auto", bytes that weights may take on the device (0 for the first GPU) and
            in memory ("cpu"), also as in "10GiB"; by default four fifths of what is free.
        config: What an Auto class read of the folder; the folder is read here.
        **hub: ``revision`` (of a folder on the hub, or of the base of an adapter in a local one;
            by default the one trained on), ``token``, ``cache_dir``, ``local_files_only``,
            ``force_download``.

    Raises:
        UserError: The folder holds no Quiet-STaR model, a damaged one, or one of a newer format, or
            the device map splits it between devices that compute.
    """
    for name in _OF_AUTO_CLASSES:
        hub.pop(name, None)
    # Unset arguments are passed as None, False or, as `subfolder`, "".
    hub = {name: value for name, value in hub.items() if value not in (None, False, "")}
    if unknown := sorted(hub.keys() - OF_DOWNLOADS):
        raise UserError(f"from_pretrained: {unknown[0]}: unknown argument. Leave it out.")
    path, on_hub = find_folder(folder, **hub)
    if on_hub:
        hub.pop("revision", None)
    hub |= {"trust_remote_code": bool(trust_remote_code)}
    if device_map is not None:
        hub |= {"device_map": device_map, "max_memory": max_memory}
    settings = read_settings(path)
    return load(cls, path, settings, dtype=dtype or "auto", trainable=trainable, **hub)


def find_folder(name: str | Path, **hub: Any) -> tuple[Path, bool]:
    """Find the folder of a model, and say whether it had to come from the hub.

    Raises:
        UserError: It is no folder, and the hub has none of this name.
    """
    path = Path(name).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(name)):
        return path, False
    try:
        return Path(snapshot_download(str(name), **hub)), True
    except Exception as problem:  # of many kinds: network, rights, names
        raise UserError(
            f"{name}: there is no such folder, and the hub did not give one ({reason_of(problem)})."
            " Give the folder of a saved model, or a name that the hub knows."
        ) from problem


def find_on_hub(name: str, revision: str | None) -> Path | None:
    """Fetch a model that thinks from the hub; None where the hub has none of this name."""
    if not HUB_ID.fullmatch(name):
        return None
    try:
        settings = cached_file(name, SETTINGS_FILE, revision=revision)
    except OSError:  # no such model, no such file in it, no network
        return None
    return None if settings is None else find_folder(name, revision=revision)[0]


def load(
    cls: type[Model],
    folder: Path,
    settings: Settings,
    *,
    dtype: torch.dtype | str,
    trainable: bool,
    **hub: Any,
) -> Model:
    """Load a saved model by these settings; arguments as in `from_pretrained`."""
    tuning, within = settings.tuning, inner_folder(folder, settings)
    source = str(within)
    _check_sampler(folder, settings.thoughts.sampler, bool(hub.get("trust_remote_code")))
    own = load_tensors(folder / WEIGHTS_FILE)
    if tuning.method not in WHOLE:
        source = settings.base_model_name_or_path
        if hub.get("revision") is None:
            hub["revision"] = settings.base_revision
    dtype = getattr(torch, settings.dtype) if dtype == "auto" else dtype
    base = load_base(
        source,
        dtype=dtype,
        quantization=quantization(tuning),
        is_exact=source == str(within),
        **hub,
    )
    _check_one_device(base)
    _check_fits(base, folder, settings)
    check_architecture(base)
    with reading(str(folder), _DAMAGED):
        use_thinking_attention(base)
        if tuning.method in PEFT_METHODS:
            # Version 1 did not keep the settings of its adapters.
            rules = tuning if settings.format_version > 1 else None
            tuned = load_adapters(base, within, tuning.method, rules, trainable)
            unfreeze(tuned, tuning.unfreeze)
        else:
            tuned = apply_tuning(base, tuning)
        sizes = (settings.vocab_size, settings.pause_token_id)
        thoughts = settings.thoughts
        needs_tokens = thoughts.stop or not thoughts.train_markers
        trust = hub.get("trust_remote_code", False)
        tokenizer = None
        with nullcontext() if needs_tokens else suppress(UserError):  # there may be none
            tokenizer = load_tokenizer(str(folder), trust_remote_code=trust)
        # The number of vectors is that of the file: earlier versions had one for any text.
        markers = [own[name] for name in ("start_embedding", "end_embedding") if name in own]
        counts = tuple(len(x) if x.ndim == 2 else 1 for x in markers)
        model: Any = cls(
            tuned, thoughts, settings.mixing_head, None, *sizes, tuning, tokenizer,
            counts if len(counts) == 2 else (1, 1),  # what is missing is refused below
        )  # fmt: skip
        width = len(own.get("mixing_head.text_layer.bias", ())) or None
        if width is not None and width != model.mixing_head.text_layer.out_features:  # up to 0.2.0
            head = model.mixing_head.text_layer
            model.mixing_head = MixingHead(head.in_features, settings.mixing_head, width).to(
                head.weight.device
            )
        model.texts_seen = settings.texts_seen
        missing, unknown = names_beside(model) - own.keys(), own.keys() - names_beside(model)
        if missing or unknown:
            raise UserError(
                f"{folder / WEIGHTS_FILE}: tensors missing {sorted(missing)}, unknown "
                f"{sorted(unknown)}. {_DAMAGED}"
            )
        model.load_state_dict(own, strict=False)
    if not trainable and tuning.method not in WHOLE:
        tuned.requires_grad_(False)
        model.has_frozen_adapters = True
    return model.eval()


def inner_folder(folder: Path, settings: Settings) -> Path:
    """Return where in a saved model its language model, or its adapters, lie."""
    return folder / LANGUAGE_MODEL_FOLDER if settings.format_version > 3 else folder


def _check_one_device(base: PreTrainedModel) -> None:
    """Refuse a language model whose layers compute on different devices.

    Thoughts hold keys and values of all layers, and tables of where these lie, on one.
    """
    ends = {embedding_weight(base).device.type, find_output_head(base).weight.device.type}
    if "meta" in ends and hasattr(base, "hf_device_map"):
        raise UserError(
            "device_map: puts embeddings or output layer elsewhere than where the model computes, "
            "but thoughts read these weights themselves. Keep both on the device."
        )
    places = {str(place) for place in getattr(base, "hf_device_map", {}).values()}
    devices = sorted(places - {"cpu", "disk"})
    if len(devices) > 1:
        raise UserError(
            f"device_map ({', '.join(devices)}): splits the model between devices that compute, "
            "which thoughts cannot. Give one device (the rest may go to cpu or disk), or shard the "
            "model with accelerate launch and FSDP2."
        )


def _check_sampler(folder: Path, sampler: str, is_trusted: bool) -> None:
    """Refuse a sampler whose module would be imported because a folder says so."""
    module = sampler.partition(":")[0]
    if ":" in sampler and not is_trusted and module not in sys.modules:
        raise UserError(
            f"{folder / SETTINGS_FILE}: thoughts.sampler ({sampler}): names code, which is not run "
            f"because a folder says so. Import {module} first, or allow it: trust_remote_code=True,"
            " or --trust-remote-code."
        )


def _check_fits(base: PreTrainedModel, folder: Path, settings: Settings) -> None:
    """Refuse settings that do not fit the language model."""
    rows = embedding_weight(base).shape[0]
    for name in ("vocab_size", "pause_token_id"):
        most = rows - (name == "pause_token_id")
        if getattr(settings, name) > most:
            raise UserError(
                f"{folder / SETTINGS_FILE}: {name} ({getattr(settings, name)}): must be at most "
                f"{most}, as the language model has {rows} tokens. {_DAMAGED}"
            )
    for name, size in settings.tuning.options.items():
        if isinstance(size, int) and size > _MOST_UNITS:
            raise UserError(
                f"{folder / SETTINGS_FILE}: tuning.options.{name} ({size}): must be at most "
                f"{_MOST_UNITS}, or memory could not hold it. {_DAMAGED}"
            )


def read_settings(folder: Path) -> Settings:
    """``quietstar.json`` of a saved model, in today's names.

    Raises:
        UserError: There is none, a damaged one, or one of a newer format.
    """
    path = folder / SETTINGS_FILE
    check_folder(folder)
    with reading(str(path), _DAMAGED):
        if not path.exists():
            if not folder.exists():
                raise UserError(f"{folder}: there is no such folder. Give that of a saved model.")
            raise UserError(
                f"{folder}: no Quiet-STaR model lies here ({SETTINGS_FILE} is missing). For a "
                "plain model use QuietStarForCausalLM.from_base."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {version} is newer than this quietstar reads "
                f"({FORMAT_VERSION}). Upgrade quietstar."
            )
        if isinstance(version, int) and version < _TODAYS_NAMES:
            content = _in_todays_names(content, folder)
        if isinstance(thoughts := content.get("thoughts"), dict):
            for name in ("schedule_type", "schedule_min_gain"):  # a saved model has no schedule
                thoughts.pop(name, None)
        _, lost = migrate([content])
        if lost:
            raise UserError(f"{path}: {lost[0]}. Load it with the version that saved it.")
        try:
            settings = Settings.model_validate(content)
            settings.tuning.method_options  # noqa: B018  (validates them)
        except ValidationError as problem:
            first = problem.errors()[0]
            key = ".".join(map(str, first["loc"]))
            value = "" if first["type"] == "missing" else f" ({shown_value(first['input'])})"
            raise UserError(f"{path}: {key}{value}: {first['msg']}. {_DAMAGED}") from problem
    for name in ("thoughts", "mixing_head", "tuning"):  # a default need not be what was trained
        section = getattr(settings, name)
        if lacking := type(section).model_fields.keys() - section.model_fields_set - _NEWER:
            raise UserError(f"{path}: {name}.{min(lacking)}: Field required. {_DAMAGED}")
    return settings


def _in_todays_names(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Translate what an earlier version wrote; `Settings` checks the result."""
    content = {name: value for name, value in content.items() if name in Settings.model_fields}
    if content["format_version"] == 1:  # knew full tuning and LoRA only
        is_lora = (folder / "adapter_config.json").exists()
        content["tuning"] = TuningConfig(method="lora" if is_lora else "full").model_dump()
    if content["format_version"] == 1:
        content["thoughts"] = ThoughtsConfig().model_dump(include=_NEW_IN_2) | content["thoughts"]
    return content
