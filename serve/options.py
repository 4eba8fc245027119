"""What can be said about a deployment, in a Serve configuration file or by the command."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Options(BaseModel):
    """How a service is deployed, whatever models it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    replicas: int = Field(1, ge=0, description="generation replicas of each model, with max_replicas the fewest")
    max_replicas: int | None = Field(None, ge=1, description="replicas that load may call for; null: as `replicas`")
    ingresses: int = Field(1, ge=1, description="processes that answer HTTP and pass the work on to the replicas")
    cpus: float = Field(1, gt=0, description="CPUs that a replica claims")
    gpus: float = Field(0, ge=0, description="GPUs that a replica claims")
    slots: int = Field(32, ge=1, description="requests that one replica generates for at once")
    max_requests: int = Field(512, ge=1, description="requests that may run and wait in one replica")
    dtype: Literal["float32", "bfloat16", "int8"] | None = Field(None, description="what weights are computed in")
    deadline_s: float = Field(600, gt=0, description="seconds that a request may take, waiting included")
    target_wait_s: float = Field(2, gt=0, description="seconds until a first token, beyond which a replica is added")
    target_tokens: int = Field(4096, ge=1, description="tokens to read and write that are enough for one replica")
    upscale_delay_s: float = Field(5, ge=0, description="seconds that the load must call for more replicas")
    downscale_delay_s: float = Field(60, ge=0, description="seconds that the load must call for fewer replicas")
    keys: str | None = Field(None, description="file of the API's keys, which every node sees; null asks for none")

    @property
    def most(self) -> int:
        """The most replicas that there may be of a model."""
        return self.max_replicas or max(1, self.replicas)

    @property
    def scales(self) -> bool:
        return self.replicas < self.most

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.most < self.replicas:
            raise ValueError(f"max_replicas ({self.most}) is below replicas ({self.replicas})")
        return self


class ApplicationArgs(Options):
    """What `args` of a Serve configuration file may say."""

    model_folder: str = Field(description="a model folder that every node sees, or s3://…/RUN/STAGE/model")
    model_name: str = Field(description="name that clients use")
    also: dict[str, str] = Field(default_factory=dict, description="folders of further models by their names")
    insecure: bool = Field(False, description="answer everyone who can reach it, although there are no keys")
