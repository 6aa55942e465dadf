"""Where thoughts come from (``thoughts.sampler``): a file each, named as the sampler."""
