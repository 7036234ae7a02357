package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"sekisho/attest"
)

// ErrNoEvents is returned by Client.Record where attestd keeps no log of
// run-time events: trying again is of no use.
var ErrNoEvents = errors.New("attestd keeps no log of run-time events")

// Record has attestd measure an event of the host domain's run time into the
// TPM. A nil error means that it is measured and that a new quote follows.
// Only root may do this. An event that was answered by another error may have
// been measured; recording it again shows it twice.
func (c *Client) Record(ctx context.Context, e attest.RunEvent) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	code, answer, err := c.do(ctx, http.MethodPost, "/v1/events", body)
	switch {
	case err != nil:
		return err
	case code == http.StatusNotFound:
		return ErrNoEvents
	case code != http.StatusOK:
		return fmt.Errorf("attestd: POST /v1/events: http status %d: %.200s", code, answer)
	}
	return nil
}
