# Sourced before training: one thread a process, and an allocator that keeps what it has.
export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
