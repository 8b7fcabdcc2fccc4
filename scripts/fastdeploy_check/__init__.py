"""Parts of ``scripts/check_fastdeploy.py`` that run FastDeploy's Python without a GPU."""
