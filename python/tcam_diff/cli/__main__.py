from tcam_diff.cli import main

main()
