"""A pipeline class around the composition engine, and entries for diffusers' `custom_pipeline=`."""
