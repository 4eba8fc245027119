"""What can be said about a deployment, in a Serve configuration file or by the command."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

VLLM = "HEADWATER_VLLM"  # the environment variable that names vLLM's command, where it isn't on the PATH


class Options(BaseModel):
    """How a service is deployed, whatever models it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    replicas: int = Field(
        default=1, ge=0, description="generation replicas of each model, with max_replicas the fewest"
    )
    max_replicas: int | None = Field(
        default=None, ge=1, description="replicas that load may call for; null: as `replicas`"
    )
    ingresses: int = Field(
        default=1, ge=1, description="processes that answer HTTP and pass the work on to the replicas"
    )
    cpus: float = Field(default=1, gt=0, description="CPUs that a replica claims")
    gpus: float = Field(default=0, ge=0, description="GPUs that a replica claims")
    engine: Literal["headwater", "vllm"] = Field(
        default="headwater", description="what generates: our engine, or a vLLM server beside each replica"
    )
    slots: int = Field(default=32, ge=1, description="requests that one replica generates for at once")
    max_requests: int = Field(default=512, ge=1, description="requests that may run and wait in one replica")
    dtype: Literal["float32", "bfloat16", "int8"] | None = Field(
        default=None, description="what weights are computed in"
    )
    deadline_s: float = Field(default=600, gt=0, description="seconds that a request may take, waiting included")
    target_wait_s: float = Field(
        default=2, gt=0, description="seconds until a first token, beyond which a replica is added"
    )
    target_tokens: int = Field(
        default=4096, ge=1, description="tokens to read and write that are enough for one replica"
    )
    upscale_delay_s: float = Field(default=5, ge=0, description="seconds that the load must call for more replicas")
    downscale_delay_s: float = Field(
        default=60, ge=0, description="seconds that the load must call for fewer replicas"
    )
    keys: str | None = Field(
        default=None, description="file of the API's keys, which every node sees; null asks for none"
    )

    @property
    def most(self) -> int:
        """The most replicas that there may be of a model."""
        return self.max_replicas or max(1, self.replicas)

    @property
    def scales(self) -> bool:
        return self.replicas < self.most

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.most < self.replicas:
            raise ValueError(f"max_replicas ({self.most}) is below replicas ({self.replicas})")
        if self.engine == "vllm" and self.dtype == "int8":
            raise ValueError("vllm doesn't compute in int8: leave dtype out, and give it a quantized model")
        return self


class ApplicationArgs(Options):
    """What `args` of a Serve configuration file may say."""

    model_folder: str = Field(description="a model folder that every node sees, or s3://…/RUN/STAGE/model")
    model_name: str = Field(description="name that clients use")
    also: dict[str, str] = Field(default_factory=dict, description="folders of further models by their names")
    insecure: bool = Field(default=False, description="answer everyone who can reach it, although there are no keys")
