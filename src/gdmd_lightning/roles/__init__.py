"""Who is who: teacher, fake score, generator, and the averages of the generator.

Whether a role is a copy of a network or an adapter on a shared one is decided here and nowhere else; methods say a
role's name and get its ``x0`` or velocity.
"""

from gdmd_lightning.roles.adapters import AdapterRoles, LoRA
from gdmd_lightning.roles.base import Role, Roles, Trainable
from gdmd_lightning.roles.copies import CopiedRoles

__all__ = ["AdapterRoles", "CopiedRoles", "LoRA", "Role", "Roles", "Trainable"]
