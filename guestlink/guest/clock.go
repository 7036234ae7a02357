package guest

import "time"

// MaxDrift is how far the clock may be off before it is set: less than what
// Kerberos or a certificate minds, more than any time service corrects slowly.
const MaxDrift = 2 * time.Second

func drift(a, b time.Time) time.Duration { return a.Sub(b).Abs() }
