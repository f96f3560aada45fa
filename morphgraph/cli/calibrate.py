"""``morphgraph calibrate``: measure what operators cost on this machine."""

from pathlib import Path
from typing import Annotated

from morphgraph.cli.command import command
from morphgraph.cli.console import note, resumed_by, show, step
from morphgraph.cli.following import tell_intention
from morphgraph.cli.progress import ProgressLines
from morphgraph.cli.shared_options import (
    DryRun,
    OutputFormat,
    Overwrite,
    Seed,
    check_output,
    output_file,
)
from morphgraph.options import option
from morphgraph.words import escape


@command
def calibrate(
    *,
    output: Annotated[Path, output_file("device.json")],
    runtime: Annotated[
        str,
        option(
            "Where networks will run: ort, ort:cuda, openvino, or module:Class of your own.",
            metavar="NAME",
        ),
    ] = "ort",
    threads: Annotated[int, option("Threads within an operator.", ge=1, metavar="N")] = 1,
    minutes: Annotated[
        float, option("After which it ends, whatever it has.", gt=0, metavar="M")
    ] = 5.0,
    kernels: Annotated[int, option("Measurements after which it ends.", ge=20, metavar="N")] = 1000,
    resume: Annotated[
        bool, option("Add to the measurements that the file has, as after an interruption.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    output_format: OutputFormat = "table",
) -> None:
    """Measure what operators cost on this machine, so that latency becomes a cost.

    Small networks of random sizes run in the runtime, and its profile tells what each operator
    takes, as the runtime fuses it and lays it out. Then `--budget latency=60% --device device.json`
    plans by milliseconds of this machine. Close other programs first: what they take is measured
    too.
    """
    from morphgraph.benchmark.calibrate import NOISY, calibrate as measure
    from morphgraph.device import load_profile
    from morphgraph.report.device import device_report

    if dry_run:
        check_output(output, overwrite or resume)
        steps = [
            f"measure up to {kernels} kernels in {runtime} with {threads} thread(s)",
            f"end after {minutes:g} minutes, whatever it has",
        ]
        tell_intention("calibrate", steps, [output], output_format)
        return
    former = load_profile(output) if resume and output.exists() else None
    check_output(output, overwrite or resume)
    resumed_by("--resume")
    with step("measuring"):
        profile = measure(
            runtime,
            threads=threads,
            minutes=minutes,
            kernels=kernels,
            resume=former,
            seed=seed,
            progress=ProgressLines(),
            keep=lambda profile: profile.save(output),
        )
    profile.save(output)
    show(device_report(profile), output_format)
    if profile.noise > NOISY:
        note(
            f"the machine is noisy: one network took {profile.noise:.0%} more or less from time "
            "to time; close other programs and calibrate again, or trust plans that are measured"
        )
    where = escape(str(output))
    note(f"wrote {where}; `plan` and `shrink` take it as --device {where} --budget latency=60%")
