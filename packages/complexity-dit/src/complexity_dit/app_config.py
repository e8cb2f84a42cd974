"""How the gallery is served and what one request may ask for."""

from dataclasses import dataclass

from inl_core.run.errors import UserError


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    max_images: int = 32
    """Pictures painted at once."""

    max_steps: int = 100
    """Denoising steps."""

    max_side: int = 512
    """Height and width in pixels."""

    max_guidance: float = 20.0
    """Guidance scale."""

    def __post_init__(self) -> None:
        for name in ("max_images", "max_steps", "max_side", "max_guidance"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass
class AppConfig:
    """Where the gallery listens, and how many may wait."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine alone, 0.0.0.0 is every network it is in.
    There is no password."""

    port: int = 7860
    """Port to listen on."""

    queue_size: int = 8
    """Requests that may wait while one is painted; more are refused."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    max_images: int = Limits.max_images
    """Pictures painted at once, at most."""

    max_steps: int = Limits.max_steps
    """Denoising steps, at most."""

    max_side: int = Limits.max_side
    """Height and width in pixels, at most."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise UserError(f"port {self.port} must be from 1 to 65535")
        if self.queue_size < 1:
            raise UserError(f"queue_size {self.queue_size} must be at least 1")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_images, self.max_steps, self.max_side)
