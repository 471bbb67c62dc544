//! Times of a device's own work, without waiting for it in between.

use burn::tensor::Device;

/// Marks in a device's queue of work, and the times between them.
#[derive(Debug)]
pub struct Clock(Inner);

#[derive(Debug)]
enum Inner {
    #[cfg(feature = "cuda")]
    Events(Box<crate::cuda::profile::Events>),
    Host(Device, Vec<std::time::Instant>),
}

impl Clock {
    /// A clock of `device`: CUDA events on Burn's stream, or the host's time after a wait elsewhere.
    pub fn new(device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(events) = crate::cuda::profile::Events::new(device) {
            return Self(Inner::Events(Box::new(events)));
        }
        Self(Inner::Host(device.clone(), vec![]))
    }

    /// Marks the end of what has been issued so far.
    ///
    /// # Errors
    /// If the device failed.
    pub fn mark(&mut self) -> Result<(), String> {
        match &mut self.0 {
            #[cfg(feature = "cuda")]
            Inner::Events(events) => events.mark(),
            Inner::Host(device, marks) => {
                device.sync().map_err(|error| error.to_string())?;
                marks.push(std::time::Instant::now());
                Ok(())
            }
        }
    }

    /// Milliseconds between neighbouring marks, which are forgotten; waits for the last.
    ///
    /// # Errors
    /// If the device failed.
    pub fn read(&mut self) -> Result<Vec<f64>, String> {
        match &mut self.0 {
            #[cfg(feature = "cuda")]
            Inner::Events(events) => events.read(),
            Inner::Host(_, marks) => {
                let between = marks.windows(2).map(|pair| pair[1] - pair[0]);
                let ms = between.map(|time| time.as_secs_f64() * 1e3).collect();
                marks.clear();
                Ok(ms)
            }
        }
    }
}

/// The middle one of `times`, the mean of the two middle ones of an even number; 0 of none.
pub fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_that_of_pythons_statistics() {
        // python3 -c 'import statistics as s; print(s.median([3, 1, 2]), s.median([4, 1, 3, 2]))'
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_clock_tells_the_time_between_marks() {
        let mut clock = Clock::new(&Device::flex());
        clock.mark().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        clock.mark().unwrap();
        clock.mark().unwrap();
        let times = clock.read().unwrap();
        assert_eq!(times.len(), 2);
        assert!(times[0] >= 20.0 && times[1] < times[0], "{times:?}");
        assert!(clock.read().unwrap().is_empty(), "marks are read once");
    }
}
