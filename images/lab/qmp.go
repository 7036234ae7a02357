package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"time"
)

// qmp gives one command to the outer QEMU (QEMU Machine Protocol: greeting,
// qmp_capabilities, command; events in between are skipped).
func qmp(ctx context.Context, execute string, arguments any) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(runDir, "qmp.sock"))
	if err != nil {
		return nil, fmt.Errorf("lab: qmp: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	in := bufio.NewScanner(conn)
	in.Buffer(nil, 1<<20)
	var result json.RawMessage
	for _, c := range []map[string]any{{"execute": "qmp_capabilities"}, {"execute": execute, "arguments": arguments}} {
		if arguments == nil {
			delete(c, "arguments")
		}
		if err := json.NewEncoder(conn).Encode(c); err != nil {
			return nil, fmt.Errorf("lab: qmp: %w", err)
		}
		if result, err = qmpAnswer(in); err != nil {
			return nil, fmt.Errorf("lab: qmp: %s: %w", c["execute"], err)
		}
	}
	return result, nil
}

func qmpAnswer(in *bufio.Scanner) (json.RawMessage, error) {
	for in.Scan() {
		var m struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(in.Bytes(), &m); err != nil {
			return nil, err
		}
		switch {
		case m.Error != nil:
			return nil, fmt.Errorf("refused: %s", m.Error.Desc)
		case m.Return != nil:
			return m.Return, nil
		}
	}
	if err := in.Err(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("connection closed before the answer")
}
