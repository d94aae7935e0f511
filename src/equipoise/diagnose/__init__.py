"""From a trace to plain rows and findings: which experts carry the load, and which do not.

One module per command (`stats`, `dead`, `diff`), `findings` for what is worth saying first, and
`evidence` for what they all need from the token rows.
"""
