"""How a role is stepped: what a method calls, and Lightning's way of doing it."""
