"""Every tag's name: what a run says of itself as text. A job, a sweep and a repetition are all found by these."""

from __future__ import annotations

# -- which run it is

KIND = "quantlab.kind"
"""``job`` or ``sweep``."""
JOB_KEY = "quantlab.key"
"""Content key of a job: by it a later sweep finds that it has finished."""
RECIPE = "quantlab.recipe"
"""Name of the recipe; empty where there was none."""
PARENT_RUN_ID = "mlflow.parentRunId"
"""On a job: the id of its sweep's run, under MLflow's own name."""
FORMER_PARENTS = "quantlab.former_parents"
"""On a job that a later sweep took over: the sweeps before, by which their comparisons find it."""
RECORD = "quantlab.record"
"""Id of the record in the run's folder, by which the run is found in any store."""

# -- what its numbers hang on

REFERENCE_KEY = "quantlab.reference_key"
"""Digest of the reference: runs that share it may stand in one column."""
WEIGHTS_SHA256 = "quantlab.weights_sha256"
"""Digest of the unquantized model's weights."""
MODEL_PARTS = "quantlab.model_parts"
"""Of the unquantized model beside its weights: part (configuration, tokenizer, scheduler) -> digest, as JSON."""
INPUTS_SHA256 = "quantlab.inputs_sha256"
"""Digest of the evaluation's inputs."""
JUDGE_SHA256 = "quantlab.judge_sha256"
"""Digest of the classifier that judges a model's images; absent where there is none."""
CALIBRATION_SHA256 = "quantlab.calibration_sha256"
"""Digest of the calibration inputs; a sentence where the scheme needs none."""
MODEL_ARTIFACT = "quantlab.model_artifact"
"""On the run that holds a trained model's files: the digest of its weights."""
DEVICE = "quantlab.device"
"""``cpu`` or ``cuda``."""
VERSIONS = "quantlab.versions"
"""Python and the libraries, as JSON."""
UNPROBED = "quantlab.unprobed"
"""Of the backend, the packages in versions that its capabilities were not probed on; absent where there are none."""
GIT_COMMIT = "mlflow.source.git.commit"
"""Commit of the checkout, under MLflow's own name; absent outside one, like the next."""
GIT_DIRTY = "quantlab.git_dirty"
"""Does the checkout differ from its commit?"""

# -- how it goes and how it ended

STAGE = "quantlab.stage"
"""Where the run is, or was when it failed; ``done`` where it has finished."""
ARTIFACT_DIGESTS = "quantlab.artifact_sha256"
"""JSON: name of a JSON artifact -> the first 16 digits of its digest, so that one that was changed is not believed."""
AFTER_LOST_DEVICE = "quantlab.after_lost_device"
"""On a job that ran in a process of its own because its sweep's process had lost the GPU: the job that lost it."""
ATTEMPT = "quantlab.attempt"
"""On a job that was begun again, as its node or its process was lost, or preempted: which attempt this is."""
EARLIER_ATTEMPTS = "quantlab.earlier_attempts"
"""Of those before it ``attempt``, ``node`` and ``reason``, as JSON; what they left is in the run's ``attempts``."""
FAILURE = "quantlab.failure"
"""Why it failed; a traceback is in its ``failure.txt``."""
HOST = "quantlab.host"
PID = "quantlab.pid"
PID_STARTED = "quantlab.pid_started"
"""With host and pid, the process that writes the run: when it began, in seconds since 1970."""
UNDEFINED = "quantlab.undefined"
"""Metrics that have no value in this run -> why, as JSON; absent where all have one."""
UNQUANTIZED = "quantlab.unquantized"
"""What stays unquantized of each component, where that is much: sentences, as JSON; absent where it is little."""
NOTE = "mlflow.note.content"
"""The description on top of a run's page, under MLflow's own name, like the next three."""
USER = "mlflow.user"
SOURCE_NAME = "mlflow.source.name"
"""The command that made the run."""
SOURCE_TYPE = "mlflow.source.type"
FAILED_JOBS = "quantlab.failed_jobs"
"""On a sweep: names of the jobs that failed."""
SEARCH_FRONT = "quantlab.search.front"
"""On a search: names of the schemes on its Pareto front."""

# -- exports

EXPORT_PATH = "quantlab.export"
"""On a run that was exported: the folder."""
EXPORT_LOADS_WITH = "export/loads_with"
"""The loaders that gave back its bits in a process without quantlab."""
EXPORT_OUTPUTS = "export/outputs_identical"
"""``yes``, or how far outputs are off and why; the metric of this name is 1 or 0."""

# -- repetitions

REPRODUCES = "quantlab.reproduces"
"""On a repetition: the id of the run that it repeats."""
REPRODUCTION = "quantlab.reproduction"
"""On a repetition: the verdict, the worst status of all numbers."""

# -- MLflow's own

LOGGED_IMAGES = "mlflow.loggedImages"
"""On a run with pictures for MLflow's image grid."""
LOGGED_TABLES = "mlflow.loggedArtifacts"
"""The tables among a run's artifacts, by which MLflow's page finds them."""
