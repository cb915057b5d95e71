"""The helpdesk: a small shop whose truth is known, to check the loop against. See README.md."""
