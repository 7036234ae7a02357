package login

import (
	"context"
	"time"

	"sekisho/hostos/login/fprint"
)

// RunReader keeps fprintd running with the state's templates, until ctx ends.
// A fingerprint reader that is not there costs no more than the finger.
func (e *Engine) RunReader(ctx context.Context, c fprint.Config) error {
	for ctx.Err() == nil {
		r, err := fprint.Start(ctx, c, e.Prints())
		if err != nil {
			e.Log.Error("fingerprint reader", "error", err)
		} else {
			e.SetReader(r)
			select {
			case <-r.Done():
				e.Log.Error("fprintd has ended")
			case <-ctx.Done():
			}
			e.SetReader(nil)
			if err := r.Close(); err != nil {
				e.Log.Debug("fingerprint reader", "error", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second):
		}
	}
	return nil
}
