"""The intermediate representation: `Graph`, its dialects, views, verification and text form."""
