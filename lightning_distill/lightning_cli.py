"""``fit``, ``validate`` and ``test``: LightningCLI with this project's parts in it."""

from __future__ import annotations

import inspect
import logging
import netrc
import os
import re
import signal
import sys
import tempfile
import warnings
from argparse import SUPPRESS
from importlib.resources import files
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from .callbacks import Dashboard, ExportDataset, HeldOutLearners, RunReport
from .checkpoints import OF_SPEED, AtomicCheckpointIO, RunCheckpoint, StopTogether, check_env, last_checkpoint
from .class_paths import imported
from .configs import check_seed, option_name, with_shipped_config
from .data import CollectorDataModule
from .distillation import Distillation
from .envs import ConfigError, EnvSpec
from .imitation import Imitation
from .loggers import MAKE_FOLDERS, gives_folders, runs_folder
from .messages import UNION, in_a_line
from .meta_ppo import MetaPPO
from .ppo import PPO
from .rollout_module import RolloutModule

logger = logging.getLogger(__name__)

#: Options of Lightning's Trainer that act in automatic optimisation only, and what acts here.
NOT_OF_THE_TRAINER = {
    "gradient_clip_val": "model.max_grad_norm clips gradients",
    "gradient_clip_algorithm": "model.max_grad_norm clips gradients, by their norm",
    "accumulate_grad_batches": "model.minibatches says how many samples a gradient is of",
}
#: What can be trained, by these names.
MODELS = (MetaPPO, PPO, Imitation)
#: Names under which schedulers take the number of iterations.
ITERATIONS = ("iterations", "T_max", "total_iters", "total_steps")


class DistillParser(LightningArgumentParser):
    """Help and messages speak of the model's options as of all others, whichever class is trained. A config that is written down follows
    ``trainer.default_root_dir`` and ``data.env``, as the one that it was made of, where another is given with it."""

    def dump(self, namespace: Namespace, *args: Any, skip_validation: bool = False, **kwargs: Any) -> str:
        if not skip_validation:
            self.validate(namespace)
        config = namespace.clone()
        loggers = config.get("trainer.logger")
        for number, each in enumerate(loggers if isinstance(loggers, list) else []):
            # Dots lead from init_args up to trainer, and beyond it: absolute paths are rewritten where parts of a config are parsed.
            sources = {"save_dir": ("trainer.default_root_dir", "${....default_root_dir}")}
            if number == 0:
                sources["name"] = ("data.env", "${.....data.env}")
            for option, (source, interpolation) in sources.items():
                if (value := each.get(f"init_args.{option}")) is not None and value == config.get(source):
                    each[f"init_args.{option}"] = interpolation
        return super().dump(config, *args, skip_validation=True, **kwargs)

    def format_help(self) -> str:
        """The options, with those of the model that ``defaults.yaml`` names at the end."""
        if not any(action.dest == "model" for action in self._actions):
            return super().format_help()
        model = LightningArgumentParser(add_help=False, usage=SUPPRESS, description=None)
        model.add_class_arguments(MetaPPO, "model", skip={"spec"}, fail_untyped=False)
        about = "Options of MetaPPO, the model unless --model or a config names another:"
        return f"{super().format_help()}\n{about}\n\n{model.format_help()}"

    def print_usage(self, file: Any = None) -> None:
        """Nothing: a hundred options would hide the message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As the parser's own, but without the types it tried in vain: what the chosen model class says comes first."""
        if self.exit_on_error:  # what a parser within says comes wrapped in what the outermost one does
            message = in_a_line(_about_what_is_missing(_about_the_model(message)))
        super().error(message, ex)


def _about_the_model(message: str) -> str:
    """Which models there are, where a message is about the choice of one; other messages as they are."""
    path = re.search(r"Expected a dot import path string: (\S+)", message)
    path = path or re.search(r"is abstract.*Given value: (\S+)", message, re.DOTALL)
    if not message.startswith('Parser key "model":') or "Problem with given class_path" in message or not path:
        return message
    allowed = f"{', '.join(model.__name__ for model in MODELS)}, or the class path of a subclass of one"
    return f"model={path[1]}: allowed are {allowed}"


def _about_what_is_missing(message: str) -> str:
    """What the command itself needs, by its name as it is typed; other messages as they are."""
    found = re.fullmatch(r"the following arguments are required: (?:\w+\.)?(\w+\.\w+)", message)
    return message if found is None else f"{found[1]}: not given, and needed"


class DistillCLI(LightningCLI):
    """``fit``, ``validate`` and ``test``; a finished ``fit`` is followed by a ``test`` of the best checkpoint."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The defaults are the first of the config files, so that their interpolations see what later ones say."""
        given = [with_shipped_config(argument) for argument in (sys.argv[1:] if args is None else args)]
        if given and given[0] in self.subcommands():
            given.insert(1, f"--config={files('lightning_distill') / 'defaults.yaml'}")
        #: Names of what was typed, not read from a file.
        self._typed = set(map(option_name, given))
        self.config = parser.parse_args(given)
        chosen = self.config[self.config.subcommand]
        check_seed(chosen.seed_everything)
        if chosen.ckpt_path == "last":
            chosen.ckpt_path = self._last_checkpoint(parser)
        if (
            chosen.ckpt_path is None
            and self.config.subcommand != "fit"
            and self._model_options().get("init_args.start") is None
        ):
            raise ConfigError(
                f"ckpt_path: not given; allowed for {self.config.subcommand} are a checkpoint's path or last, "
                "or a dataset to begin with (--model.start)"
            )
        if chosen.ckpt_path is not None:
            # Before Lightning reads it, less carefully, and before loggers begin.
            check_env(AtomicCheckpointIO().load_checkpoint(chosen.ckpt_path), chosen.data.env)

    def _parse_ckpt_path(self) -> None:
        """Lightning takes the model's options from a checkpoint; a run that goes on may not have been given others.

        A test or validation is of the checkpoint's model, whatever the config would train; what is typed beside it may not differ.
        """
        given = self._model_options()
        super()._parse_ckpt_path()
        chosen = self.config[self.config.subcommand]
        if unknown := set(self._model_options().get("dict_kwargs") or ()) - set(given.get("dict_kwargs") or ()):
            raise ConfigError(
                f"ckpt_path: holds options that {chosen.model.class_path} does not take ({', '.join(sorted(unknown))}): of an earlier version; what it "
                "has learned is in the dataset that was written beside it (--model.start=FILE)"
            )
        if chosen.ckpt_path is None:
            return
        for name in OF_SPEED:
            if (option := f"init_args.{name}") in given:
                chosen.model[option] = given[option]
        fits = self.config.subcommand == "fit"
        for option, saved in self._model_options().items():
            name = f"model.{option}".replace("init_args.", "").removesuffix(".class_path")
            # model.family.width is typed as itself, or as a part of model.family.
            parts = name.split(".")
            typed = not self._typed.isdisjoint({name, *(".".join(parts[:end]) for end in range(2, len(parts)))})
            if _same(given.get(option), saved) or not (fits or typed):
                continue
            why = (
                "goes on with the options that it began with; to train what it has learned with others, begin with --model.start=FILE of its dataset"
                if fits
                else "is tested as it was trained; what its dataset teaches others, and by other rules, is told by lightning-distill evaluate"
            )
            raise ConfigError(f"{name}={given.get(option)!r}: the run of ckpt_path has {saved!r}, and {why}")

    def _model_options(self) -> dict[str, Any]:
        """The model's class and options by name, without what is linked to it."""
        model = self.config[self.config.subcommand].model
        options = {} if model is None else vars(model.as_flat())
        return {name: value for name, value in options.items() if name.rpartition(".")[2] != "spec"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(HeldOutLearners, "held_out")
        parser.add_lightning_class_args(ExportDataset, "export")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_lightning_class_args(RunReport, "report")
        parser.link_arguments("data.spec", "model.init_args.spec", compute_fn=EnvSpec.as_dict, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        # Advertising, and a notice for developers of Lightning itself; all other messages pass.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertising)
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        # Evaluations are gathered before they are logged: all processes log the same.
        warnings.filterwarnings("ignore", message=r".*It is recommended to use .*sync_dist=True.*")
        # While the critic warms up, the actor's schedule goes on without it.
        warnings.filterwarnings("ignore", message=r".*lr_scheduler.step\(\).* before .*optimizer.step\(\).*")
        trainer = self._get(self.config, "trainer")
        option, root = runs_folder(trainer)
        try:
            os.makedirs(root, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as error:
            raise ConfigError(f"{option}={root!r}: not writable ({error.strerror})") from error
        holds_one = os.path.exists(os.path.join(root, "config.yaml"))
        if not gives_folders(trainer.get("logger")) and not trainer.get("fast_dev_run") and holds_one:
            raise ConfigError(
                f"{option}={root!r}: has a config.yaml already, and without a logger that makes them runs have no folders of "
                "their own; allowed is a folder without one (--ckpt_path=FILE goes on from a run in another), or a first logger of "
                f"{', '.join(MAKE_FOLDERS)}"
            )
        for option, own in NOT_OF_THE_TRAINER.items():
            if trainer.get(option) not in (None, 1):
                raise ConfigError(f"trainer.{option}={trainer.get(option)}: allowed is to leave it out; {own}")
        self._check_scheduler()
        if not _logged_in_to_wandb():
            os.environ.setdefault("WANDB_MODE", "offline")

    def _check_scheduler(self) -> None:
        """A scheduler is called with the number of iterations in second place: many of torch's have something else there."""
        path = self._model_options().get("init_args.scheduler.class_path")
        if path is None:  # a function, or the default
            return
        second = list(inspect.signature(imported(path)).parameters)[1]
        if second not in ITERATIONS:
            raise ConfigError(
                f"model.scheduler={path}: called with an optimiser and the number of iterations, which it would take for its {second!r}; "
                f"allowed are classes that have {', '.join(ITERATIONS)} there, as CosineAnnealingLR, and functions: "
                "def mine(optimizer, iterations) -> LRScheduler: return StepLR(optimizer, 10)"
            )

    def _last_checkpoint(self, parser: LightningArgumentParser) -> str | None:
        """Of the newest run of this config. Lightning's own ``last`` looks into the run's folder, here always a new one."""
        command = self.config.subcommand
        _, root = runs_folder(self.config[command].trainer)
        found = last_checkpoint(root, yaml.safe_load(parser.dump(self.config))[command])
        message = f"ckpt_path='last': no last.ckpt of this config below {root!r}"
        if found is None and command != "fit":
            raise ConfigError(message)
        print(f"{message} yet: starting from the beginning" if found is None else f"going on from {found}")
        return None if found is None else str(found)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            # It names the options that it is about, but for those that differ from machine to machine.
            if not re.search("backend|accelerator|device", str(error)):
                raise
            trainer = self._get(self.config, "trainer")
            named = ", ".join(f"trainer.{name}={trainer.get(name)!r}" for name in ("accelerator", "devices"))
            raise ConfigError(f"{named}: {error}") from error
        except ValueError as error:
            # What a class says of its own arguments comes wrapped in what the parser tried.
            if not str(error).startswith(UNION):
                raise
            raise ConfigError(in_a_line(str(error))) from error
        if self.subcommand == "fit":
            self.model.check(self.trainer, self.datamodule)  # before loggers begin

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        parser = self._parser(self.subcommand)
        if self._get(self.config_init, "trainer").get("enable_checkpointing") is False:
            parser.callback_keys = [key for key in parser.callback_keys if not key.endswith("checkpoint")]
        if not isinstance(self.model, Distillation):
            # Direct RL has no dataset to write down or to teach others with: its policy is in the checkpoints.
            parser.callback_keys = [key for key in parser.callback_keys if key not in ("held_out", "export")]
            if families := self._get(self.config, "held_out").get("families"):
                logger.warning("held_out.families=%s has no effect: direct RL teaches nobody else", families)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:  # of Lightning, of options that cannot be or do not go together
            raise ConfigError(f"trainer: {error}") from error
        for callback in trainer.callbacks:
            if isinstance(callback, ExportDataset):
                callback.config = self.parser.dump(self.config)
        return trainer

    def after_fit(self) -> None:
        trainer = self.trainer
        if trainer.interrupted or trainer.fast_dev_run:
            return
        # Not a checkpoint callback of the user's, which would come first: it may have kept another moment.
        best = next((own.best_model_path for own in trainer.checkpoint_callbacks if isinstance(own, RunCheckpoint)), "")
        trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False, weights_only=True)


def _same(given: Any, saved: Any) -> bool:
    """Whether two values of an option are the same; a class may be named by another path."""
    if given == saved or not (isinstance(given, str) and isinstance(saved, str)):
        return given == saved
    try:
        return imported(given) is imported(saved)
    except (ImportError, AttributeError, ValueError):  # at least one is no path
        return False


def _no_advertising(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.msg


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class CheckingCLI(DistillCLI):
    """Makes everything, checks it, and does nothing with it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run(args: list[str] | None = None, cli: type[DistillCLI] = DistillCLI) -> None:
    """Parse and carry out ``fit``, ``validate`` or ``test``; ``args`` default to the process's own."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    # A prefix of an option's name, taken for the option, would hide a misspelt one.
    options = {"parser_mode": "omegaconf+", "allow_abbrev": False}
    try:
        cli(
            RolloutModule,
            CollectorDataModule,
            subclass_mode_model=True,
            parser_class=DistillParser,
            parser_kwargs={**options, **{name: dict(options) for name in DistillCLI.subcommands()}},
            auto_configure_optimizers=False,
            trainer_defaults={"callbacks": [StopTogether()]},
            args=args,
        )
    except MisconfigurationException as error:
        # On the way, too, as a checkpoint.monitor that nobody logs: last.ckpt is there to go on from.
        raise ConfigError(str(error)) from error
    except SIGTERMException:
        # Lightning's leaves with 0, which a scheduler would take for a finished run. The other processes do leave with 0:
        # Lightning kills the first, which may still have to write, when one of them fails.
        sys.exit(0 if rank_zero_only.rank else 128 + signal.SIGTERM)
