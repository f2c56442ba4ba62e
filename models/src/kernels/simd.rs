//! Instruction sets: found once at run time, so that one binary runs well everywhere.
//!
//! Kernels outside the matrix product are plain loops, compiled once per instruction set by
//! [`dispatch!`]; they use no fused multiply-add, so their results are the same on every machine.

/// What the processor offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// AVX-512F with the VL, BW and DQ extensions.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the compilation target guarantees.
    Baseline,
}

impl Level {
    /// The best level of this machine. The standard library caches the answer.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if avx512 && avx2 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// Every level that this machine has.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        match Self::detect() {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => vec![Self::Avx512, Self::Avx2, Self::Baseline],
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => vec![Self::Avx2, Self::Baseline],
            Self::Baseline => vec![Self::Baseline],
        }
    }
}

/// `dispatch! { fn name(args..) = body; }` defines `name`, which runs the `#[inline(always)]` function
/// `body` compiled for the best instruction set of this machine.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:expr;) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            unsafe fn body($($arg: $ty),*) {
                $body($($arg),*)
            }
            $crate::kernels::simd::by_level!(body; $($arg: $ty),*)
        }
    };
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:expr;) => {
        $(#[$meta])*
        $vis unsafe fn $name($($arg: $ty),*) {
            $crate::kernels::simd::by_level!($body; $($arg: $ty),*)
        }
    };
}
pub(crate) use dispatch;

/// The body of a function made by [`dispatch!`].
macro_rules! by_level {
    ($body:expr; $($arg:ident: $ty:ty),*) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: the caller keeps what the body asks for.
                unsafe { $body($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $body($($arg),*) }
            }
            match $crate::kernels::simd::Level::detect() {
                // SAFETY: `detect` found every feature that the function enables; the rest as above.
                $crate::kernels::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::kernels::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::kernels::simd::Level::Baseline => {}
            }
        }
        // SAFETY: as above.
        unsafe { $body($($arg),*) }
    }};
}
pub(crate) use by_level;
