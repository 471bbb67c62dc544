//! Numbers for people.

use std::time::Duration;

/// 1,234,567 things as "1.23 M"; k, M, B, T, three digits.
pub fn count(value: f64) -> String {
    scaled(value, &["k", "M", "B", "T"])
}

/// Arithmetic with the prefixes of SI: "2.84 GFLOP", up to ZFLOP.
pub fn flop(value: f64) -> String {
    scaled(
        value,
        &[
            "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP",
        ],
    )
}

fn scaled(value: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, "");
    for larger in units {
        // What would be rounded to 1000 belongs to the next unit.
        if value.abs() < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, *larger);
    }
    let decimals = match value.abs() {
        v if unit.is_empty() && v.fract() == 0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    match unit {
        "" => format!("{value:.decimals$}"),
        unit => format!("{value:.decimals$} {unit}"),
    }
}

/// 1234567 as "1,234,567".
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// "45s", "3m20s", "5h07m", "12d03h".
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// Bytes in GiB.
pub fn gib(bytes: f64) -> f64 {
    bytes / (1u64 << 30) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        for (value, text) in [
            (0.0, "0"),
            (12.0, "12"),
            (999.0, "999"),
            (999.6, "1.00 k"),
            (1_234_567.0, "1.23 M"),
            (23_456_000.0, "23.5 M"),
            (999_900.0, "1.00 M"),
            (8.19e9, "8.19 B"),
            (1.2e14, "120 T"),
        ] {
            assert_eq!(count(value), text);
        }
        assert_eq!(flop(3.4e21), "3.40 ZFLOP");
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(123_456), "123,456");
    }

    #[test]
    fn times_have_two_units() {
        for (seconds, text) in [
            (5, "5s"),
            (200, "3m20s"),
            (18_420, "5h07m"),
            (1_047_600, "12d03h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}
