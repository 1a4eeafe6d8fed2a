//! The polynomial in `config` by which restic's chunker finds its cuts (`doc/design.rst`, chunking).
//!
//! Polynomials over GF(2) are written as integers, bit `n` the coefficient of `x^n`.

use rand::RngExt;

const DEGREE: u32 = 53;

/// A random irreducible polynomial of degree 53.
pub(crate) fn random() -> u64 {
    loop {
        let low: u64 = rand::rng().random_range(0..1 << DEGREE);
        let candidate = (1 << DEGREE) | low | 1;
        if is_irreducible(candidate) {
            return candidate;
        }
    }
}

fn degree(polynomial: u128) -> u32 {
    127 - polynomial.leading_zeros()
}

fn remainder(mut value: u128, modulus: u128) -> u128 {
    while value != 0 && degree(value) >= degree(modulus) {
        value ^= modulus << (degree(value) - degree(modulus));
    }
    value
}

/// The square of a polynomial has its coefficients at doubled powers.
fn square(value: u128, modulus: u128) -> u128 {
    let spread =
        (0..64).filter(|bit| value >> bit & 1 == 1).fold(0, |sum, bit| sum | 1 << (2 * bit));
    remainder(spread, modulus)
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, remainder(a, b));
    }
    a
}

/// Ben-Or's test: no factor of degree up to half its own.
fn is_irreducible(polynomial: u64) -> bool {
    let modulus = u128::from(polynomial);
    let mut power = 2;
    for _ in 0..degree(modulus) / 2 {
        power = square(power, modulus);
        if gcd(modulus, power ^ 2) != 1 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_polynomials_are_judged_as_in_the_tables() {
        let irreducible = |p| is_irreducible(p);
        // x²+x+1, x³+x+1, x⁸+x⁴+x³+x+1 (AES), and one that restic chose
        assert!([0b111, 0b1011, 0x11b, 0x2d_2f30_e428_6d9b].into_iter().all(irreducible));
        // (x+1)², (x+1)(x²+x+1), (x²+x+1)²
        assert!(![0b101, 0b1001, 0b10101].into_iter().any(irreducible));
    }

    #[test]
    fn random_ones_have_degree_53() {
        let polynomial = random();
        assert_eq!(polynomial >> DEGREE, 1);
        assert!(is_irreducible(polynomial));
    }
}
