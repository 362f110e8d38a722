"""Concept-aware fine-tuning inside other people's trainers.

axolotl.py          CAFTPlugin, a plugin of Axolotl
axolotl_section.py  its section `caft:`, and what does not work with heads there
"""
