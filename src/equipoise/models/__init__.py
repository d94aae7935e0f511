"""Where the routers are in a model: find them, and watch what they select.

`discover(model)` gives one RouterSite per router; `site.observe(callback)` delivers a Routing on
every forward pass. Adapters for odd architectures stand in `adapters`.
"""

from equipoise.models.configs import is_moe_config
from equipoise.models.discover import discover
from equipoise.models.sites import Handle, RouterSite, check_routing, valid_tokens

__all__ = ["Handle", "RouterSite", "check_routing", "discover", "is_moe_config", "valid_tokens"]
