"""What ``scripts/check_fastdeploy.py`` needs to run FastDeploy's Python without a GPU."""
