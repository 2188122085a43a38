"""`python -m mask2former.ops`: which implementation of deformable attention is used here, and why."""

from mask2former.ops._extension import describe

if __name__ == "__main__":
    print(describe())
