import sys

from benchmarks.sweep import main

main(sys.argv[2:])
