"""Distributed runs: two processes train, evaluate and predict as one does, and all end if one fails."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.two_hosts import STEPS, back_again, survivor, two_hosts, wait_for_steps, why_not
from PIL import Image

from shunted_lit.cli import main
from shunted_lit.data import ShapesDataModule
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask
from shunted_lit.utils.files import lock_folder
from shunted_lit.utils.labels import IGNORED

ROOT = Path(__file__).parents[2]

# No BatchNorm, as SyncBatchNorm needs GPUs; 13 validation images, not divisible by 2. In float64, as AdamW turns even
# rounding errors of the gradients into full steps.
COMMON = [
    "--data=ShapesDataModule", "--data.size=32", "--data.train_size=16", "--data.val_size=13", "--data.num_workers=0",
    "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.precision=64-true", "--report.images=0",
    "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--model.warmup_epochs=0",
]  # fmt: skip
NARROW = ["--model.backbone=pvt_v2_b0", "--model.levels=[3,4]", "--model.extra_levels=0", "--model.pyramid_channels=32",
          "--model.min_size=32", "--model.max_size=32"]  # fmt: skip
TASKS = {
    "classification": ["--model=ClassificationTask", "--model.backbone_options={stem: patch4, depths: [1, 1, 1, 1]}"],
    "fcos": ["--model=DetectionTask", *NARROW, "--model.detector=fcos", "--model.neck={depth: 1}",
             "--model.neck_levels=[4]"],
    "retinanet": ["--model=DetectionTask", *NARROW, "--model.detector=retinanet"],
    "segmentation": ["--model=SegmentationTask", "--model.backbone=pvt_v2_b0", "--model.decoder=fpn",
                     "--model.neck={depth: 1}", "--model.decoder_options={dropout: 0.0}"],
}  # fmt: skip
# All runs in the same processes, as starting them takes longest.
SEVERAL = """
import json, sys
from shunted_lit.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


def words(name, folder, batch_size, **more):
    further = [f"--{key}={value}" for key, value in more.items()]
    return ["fit", *COMMON, *TASKS[name], f"--data.batch_size={batch_size}",
            f"--trainer.default_root_dir={folder}", *further]  # fmt: skip


def torchrun(*args, count=2, timeout=300, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.run([*launch, *args], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train each task with two processes; return the folder of the runs."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "several.py"
    script.write_text(SEVERAL)
    several = [words(name, folder / name, 4, **{"trainer.strategy": "ddp", "trainer.devices": 2}) for name in TASKS]
    done = torchrun(str(script), json.dumps(several))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_two_processes_train_and_evaluate_as_one(name, trained, tmp_path):
    main(words(name, tmp_path, 8))
    one, two = tmp_path / "version_0", trained / name / "version_0"
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 50
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)
    scores = [{key: float(value) for row in rows(run) for key, value in row.items() if key.startswith("val/") and value}
              for run in (one, two)]  # fmt: skip
    assert scores[0].keys() == scores[1].keys()
    assert len(scores[0]) >= 2
    for key in scores[0]:
        assert scores[0][key] == pytest.approx(scores[1][key], abs=1e-5), key


@pytest.mark.slow
def test_each_validation_image_counts_once(trained):
    """Of 13 images, the 2 ranks have 7 and 6; the table of classes counts each pixel once."""
    with (trained / "segmentation/version_0/class_iou.csv").open(newline="") as file:
        assert sum(int(row["pixels"]) for row in csv.DictReader(file)) == 13 * 32 * 32


@pytest.mark.parametrize("images", [7, 2, 3])
def test_ranks_evaluate_each_image_once(images):
    data, shares = ShapesDataModule(val_size=images, num_workers=0), []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        share = data.evaluation_sampler(data.dataset("val"))
        shares.append(list(share))
        assert len(share) == len(shares[-1])
    assert sorted(shares[0] + shares[1]) == list(range(images))


def test_fewer_images_than_ranks_are_rejected():
    data = ShapesDataModule(val_size=1, num_workers=0)
    data.trainer = SimpleNamespace(world_size=2, global_rank=1)
    data.dataset("val")
    with pytest.raises(ValueError, match="2 devices need as many images, got 1; use fewer devices"):
        data.val_dataloader()


@pytest.mark.parametrize("boxes", [3, 0])
@pytest.mark.parametrize("options", [
    {"detector": "fcos", "neck": {"depth": 1}, "neck_levels": [3, 4, 5]},
    {"detector": "retinanet", "levels": [3, 4], "neck": {"depth": 1}, "neck_levels": [3]},
    {"detector": "faster_rcnn", "backbone": "shunted_t", "extra_levels": 1},
    {"detector": "mask_rcnn", "extra_levels": 1},
    {"detector": "fcos", "freeze_backbone": True, "neck": {"depth": 1}},
], ids=lambda options: options["detector"])  # fmt: skip
def test_every_detector_parameter_gets_a_gradient(options, boxes):
    """DDP would wait for a missing one; images without objects are no exception."""
    task = DetectionTask(3, **{"backbone": "resnet18", "min_size": 64, "max_size": 64, **options})
    corners = torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 50], [1, 30, 20, 62]])[:boxes]
    masks = torch.ones(boxes, 64, 64, dtype=torch.bool)
    target = {"boxes": corners, "labels": torch.arange(3)[:boxes], "masks": masks}
    assert_all_gradients(task, ([torch.rand(3, 64, 64)] * 2, [target] * 2))


@pytest.mark.parametrize("options", [
    {"decoder": "fpn", "neck": {"depth": 1}}, {"decoder": "upernet", "auxiliary_weight": 0.4}, {"decoder": "segformer"},
], ids=lambda options: options["decoder"])  # fmt: skip
@pytest.mark.parametrize("label", [1, IGNORED])
def test_every_segmenter_parameter_gets_a_gradient(options, label):
    task = SegmentationTask(3, **options)
    maps = [torch.full((64, 64), label, dtype=torch.uint8)] * 2
    assert_all_gradients(task, ([torch.rand(3, 64, 64)] * 2, maps))


@pytest.mark.parametrize("backbone", ["shunted_t", "shunted_s"])
def test_every_classifier_parameter_gets_a_gradient(backbone):
    task = ClassificationTask(3, backbone=backbone)
    assert_all_gradients(task, (torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 2])))


def assert_all_gradients(task, batch):
    task.log = task.log_dict = lambda *args, **keywords: None
    task.training_step(batch, 0).backward()
    unused = [name for name, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not unused


# --- errors


def fails(*args, script=None, **env):
    """Run two processes that fail, and end without help; return their messages."""
    done = torchrun(*(["-m", "shunted_lit"] if script is None else [str(script)]), *args, timeout=120, **env)
    assert done.returncode not in (0, 124), done.stderr[-2000:]
    return done.stderr


@pytest.mark.slow
def test_unreadable_image_on_one_rank_ends_all(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 2}.items():
        for kind in ("cat", "dog"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    damaged = tmp_path / "train/cat/3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])  # its header is intact
    output = fails(
        "fit", "--model=ClassificationTask", "--data=ImageFolderDataModule", f"--data.root={tmp_path}",
        "--data.image_size=32", "--data.batch_size=4", "--data.num_workers=1", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1", "--trainer.logger=false",
    )  # fmt: skip
    assert f"error: {damaged}: not a readable image" in output


DIFFERENT = """
import os, sys
import shunted_lit
from shunted_lit.cli import main
words, rank = sys.argv[1:], os.environ["RANK"]
if os.environ["DIFFERS"] == "version" and rank == "1":
    shunted_lit.__version__ = "0.0.9"
if os.environ["DIFFERS"] == "images" and rank == "1":
    words.append("--data.train_size=15")
try:
    main(words)
except ValueError as error:
    print(f"rank {rank}: {error}", file=sys.stderr)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("differs", "message"), [
    ("version", "shunted_lit must be the same on all ranks, but rank 0 has 0.1.0 and rank 1 has 0.0.9"),
    ("images", "images of train must be the same on all ranks, but rank 0 has 16 and rank 1 has 15"),
])  # fmt: skip
def test_differing_ranks_are_reported(differs, message, tmp_path):
    (tmp_path / "different.py").write_text(DIFFERENT)
    several = {"trainer.strategy": "ddp", "trainer.devices": 2}
    output = fails(
        *words("classification", tmp_path, 4, **several), script=tmp_path / "different.py", DIFFERS=differs
    )  # fmt: skip
    assert f"rank 0: {message}" in output or f"rank 1: {message}" in output  # torchrun ends the slower one


@pytest.mark.slow
def test_two_processes_stop_at_a_signal_and_resume(trained, tmp_path):
    """SIGTERM to both within an epoch, then --ckpt_path last: the weights equal those of an uninterrupted run."""
    command = words("fcos", tmp_path, 4, **{"trainer.strategy": "ddp", "trainer.devices": 2, "ckpt_path": "last"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "shunted_lit"]
    with subprocess.Popen([*launch, *command], stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:  # fmt: skip
        wait_for_steps(1, tmp_path, [process])
        process.send_signal(signal.SIGTERM)  # torchrun forwards it
        output = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "stopped after step" in output, output[-2000:]
    done = torchrun("-m", "shunted_lit", *command)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [
        torch.load(run / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path, trained / "fcos")
    ]
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)  # Lightning loads float64 through float32
    assert [int(row["step"]) for row in rows(tmp_path / "version_0") if row["train/loss"]] == [0, 1, 2, 3]


# --- prediction in chunks


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(21):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def predict(trained, pictures, out, *further, checkpoint="last"):
    file = trained / f"fcos/version_0/checkpoints/{checkpoint}.ckpt"
    return ["predict", f"--ckpt_path={file}", f"--data.images={pictures}", "--data.num_workers=0",
            f"--predictions.out={out}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
            "--predictions.min_score=0.01", "--model.detector_options={score_thresh: 0.001}", *further]  # fmt: skip


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_thread():
    """Use one thread, as torchrun does: more threads round sums differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_resume_the_prediction_of_one(trained, pictures, tmp_path, capsys, one_thread):
    main(predict(trained, pictures, tmp_path / "one"))
    expected = files_in(tmp_path / "one")
    assert len(expected) == 21 * 2 + 2
    assert b'"score"' in expected[Path("predictions.json")]
    out = tmp_path / "two"
    # One process stops after 8 images; two processes predict the rest.
    main(predict(trained, pictures, out, "--trainer.limit_predict_batches=8"))
    assert "2 of 7 chunks are complete; run the same command again to resume" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (out / "labels").iterdir()}
    assert len(times) == 8
    several = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    done = torchrun("-m", "shunted_lit", *predict(trained, pictures, out, *several))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^21 images", done.stdout, re.MULTILINE)) == 1
    assert "resuming after 2 of 7 chunks" in done.stderr
    assert files_in(out) == expected
    kept = [path for path, time_ns in times.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) == 6, "two chunks of 3 images"


@pytest.mark.slow
def test_chunks_of_another_prediction_are_rejected(trained, pictures, tmp_path):
    main(predict(trained, pictures, tmp_path, "--trainer.limit_predict_batches=4"))
    with pytest.raises(ValueError, match=r"was started with weights .*, now it is .*; remove this folder"):
        main(predict(trained, pictures, tmp_path, checkpoint="best"))
    with pytest.raises(ValueError, match=r"was started with min_score 0\.01, now it is 0\.5"):
        main([*predict(trained, pictures, tmp_path), "--predictions.min_score=0.5"])
    lock = lock_folder(tmp_path / ".chunks")
    with pytest.raises(ValueError, match=r"\.chunks: another process is writing to it"):
        main(predict(trained, pictures, tmp_path))
    lock.release()
    (tmp_path / ".chunks/origin.json").write_text("{")
    with pytest.raises(ValueError, match=r"\.chunks: damaged, cannot be resumed .*; remove this folder"):
        main(predict(trained, pictures, tmp_path))


@pytest.mark.slow
def test_prediction_without_pictures(trained, pictures, tmp_path):
    main(predict(trained, pictures, tmp_path, "--predictions.pictures=false"))
    assert not (tmp_path / "pictures").exists()
    assert len(list((tmp_path / "labels").iterdir())) == 21


@pytest.mark.slow
def test_fewer_images_than_devices_are_predicted(trained, pictures, tmp_path):
    done = torchrun("-m", "shunted_lit", *predict(trained, pictures / "00.png", tmp_path, "--trainer.devices=2",
                                                  "--trainer.strategy=ddp"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 image" in done.stdout
    assert len(list((tmp_path / "labels").iterdir())) == 1


@pytest.mark.slow
def test_changed_images_are_noticed(trained, pictures, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pictures, source)
    main(predict(trained, source, out, "--trainer.limit_predict_batches=4"))
    Image.new("RGB", (40, 30)).save(source / "00.png")
    with pytest.raises(ValueError, match=r"was started with names, sizes and times of images"):
        main(predict(trained, source, out))
    (source / "20.png").unlink()
    with pytest.raises(ValueError, match="was started with number of images 21, now it is 20"):
        main(predict(trained, source, out))
    with pytest.raises(ValueError, match=r"was started with folder .*source, now it is"):
        main(predict(trained, pictures, out))


# --- more than one host


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")
def test_dead_host_ends_the_other_and_can_return(tmp_path):
    with two_hosts() as hosts:
        code, seconds = survivor(hosts, tmp_path / "survivor")
        output = (tmp_path / "survivor/node_0.log").read_text()
        assert code != 0
        assert seconds < 60
        assert "Another process of this run has ended or cannot be reached" in output
        codes, steps = back_again(hosts, tmp_path / "back_again")
        assert codes == [0, 0]
        assert steps == list(range(STEPS)), "each step once, none lost"


# Stubs of SLURM's commands: start tasks, with their ranks, and forward signals; record requeued jobs.
STUBS = {
    "srun": """#!/bin/bash
shift  # --kill-on-bad-exit
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do
    while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done
    if [ $code -gt ${worst:-0} ]; then worst=$code; fi
done
exit ${worst:-0}
""",
    "scontrol": """#!/bin/bash
echo "$@" >> requeued.txt
""",
    "shunted-lit": f"""#!/bin/bash
exec {sys.executable} -m shunted_lit "$@"
""",
}
FOR_TEST = [word for word in COMMON if word.partition("=")[0] != "--trainer.precision"]


@pytest.mark.slow
def test_slurm_job_stops_before_its_time_limit_and_is_requeued(tmp_path):
    """The template with a small network on drawn shapes, and with stubs for the commands of SLURM."""
    places = tmp_path / "bin"
    places.mkdir()
    for name, content in STUBS.items():
        (places / name).write_text(content)
        (places / name).chmod(0o755)
    text = (ROOT / "configs/slurm.sbatch").read_text()
    assert "--signal=TERM@" in text
    assert "--requeue" in text
    small = tmp_path / "small.yaml"
    small.write_text("model: {class_path: ClassificationTask, init_args: {backbone_options: {depths: [1, 1, 1, 1]}}}")
    job = tmp_path / "job.sbatch"
    job.write_text(text.replace("configs/imagenet/shunted_s.yaml", str(small)))
    env = {
        **os.environ, "PATH": f"{places}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "shunted_s",
        "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533",
    }  # fmt: skip
    command = ["bash", str(job), *FOR_TEST, "--data.batch_size=4", "--trainer.max_epochs=8",
               "--trainer.sync_batchnorm=false", "--checkpoint.save_top_k=0"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
        wait_for_steps(1, tmp_path / "runs", [process])
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(listed.split()[0]), signal.SIGTERM)  # SLURM signals the steps of a job, not its script
        output = process.communicate(timeout=120)[1]
    assert process.returncode == 143, output[-3000:]
    assert (tmp_path / "requeued.txt").read_text() == "requeue 77\n"
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [int(row["step"]) for row in rows(tmp_path / "runs/version_0") if row["train/loss"]]
    assert steps == list(range(16)), "8 epochs of 2 steps, none lost"
    assert (tmp_path / "requeued.txt").read_text() == "requeue 77\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_test_command_reproduces_the_validation_score(name, trained, tmp_path):
    """The best checkpoint of two processes, tested in one, has the score that made it the best."""
    run = trained / name / "version_0"
    further = ["--trainer.accelerator=cpu", "--trainer.precision=64-true", "--data.num_workers=0"]
    checkpoint = f"--ckpt_path={run / 'checkpoints/best.ckpt'}"
    cli = main(["test", checkpoint, *further, f"--trainer.default_root_dir={tmp_path}"])
    score = "acc1" if name == "classification" else "miou"
    best = max(float(row[f"val/{score}"]) for row in rows(run) if row[f"val/{score}"])
    assert float(cli.trainer.callback_metrics[f"test/{score}"]) == pytest.approx(best, abs=1e-6)
