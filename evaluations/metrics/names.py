"""What the distances are called. The extractor is part of the name, because numbers of two extractors never compare."""

NAMES = {"i3d": "fvd_i3d", "videomae": "fd_videomae", "effnet": "fcd_effnet"}  # extractor -> its Frechet distance
KERNEL_NAMES = {"i3d": "kvd_i3d", "videomae": "kd_videomae", "effnet": "kcd_effnet"}
# Convention of a covariance -> what is taken off the number of clips. LARP and StyleGAN-V: n.
COVARIANCES = {"n": 0, "n-1": 1}
