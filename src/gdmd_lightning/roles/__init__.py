"""Roles: the teacher and the networks that a method trains, averages or keeps.

Whether a role is a copy of the network or an adapter on a shared one is decided here and nowhere else; methods name
a role and get its ``x0`` or velocity.
"""

from gdmd_lightning.roles.adapters import AdapterRoles, LoRA
from gdmd_lightning.roles.base import Form, Roles
from gdmd_lightning.roles.copies import CopiedRoles
from gdmd_lightning.roles.sharded import ShardedAdapterRoles, ShardedRoles
from gdmd_lightning.roles.spec import REFERENCE, TEACHER, Head, Optimization, RoleSpec

__all__ = [
    "REFERENCE",
    "TEACHER",
    "AdapterRoles",
    "CopiedRoles",
    "Form",
    "Head",
    "LoRA",
    "Optimization",
    "RoleSpec",
    "Roles",
    "ShardedAdapterRoles",
    "ShardedRoles",
]
