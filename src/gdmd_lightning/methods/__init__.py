"""The methods: LightningModules that compose families, roles, samplers, objectives and rewards."""
